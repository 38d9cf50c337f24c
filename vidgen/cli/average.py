"""`vidgen average`: averages a run's weights over another length, after training."""

import argparse
import shutil
import sys
from collections.abc import Sequence

from vidgen.cli.main import run
from vidgen.core.errors import UserError
from vidgen.core.paths import path_option

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen train --config=experiments/dit/sprites.py --workdir=runs/dit --config.run.power_law.every=500
  vidgen average --checkpoint runs/dit --sigma-rel 0.15 --out runs/dit-0.15
  vidgen sample --checkpoint runs/dit-0.15 --prompt "a red circle moving left" --out a.mp4

The run stores snapshots of averages of two widths (run.power_law); an average of any width is computed from
them (arXiv 2312.02696). The output is a workdir to sample from, to evaluate, or to initialize other runs from
(run.init_from). It has no optimizer state, so training cannot resume from it.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"--out {arguments.out} is there already: name a folder that is not")

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    import optax

    from vidgen.ckpt.manager import CheckpointManager
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.train.experiment import load_experiment
    from vidgen.train.snapshots import averaged_weights
    from vidgen.train.state import abstract_base, abstract_state, restore_averaged

    experiment = load_experiment(arguments.checkpoint)
    if experiment.task.scores != "prompts":
        raise UserError(
            f"{arguments.checkpoint} is a run of kind {experiment.task.kind!r}; only runs of kind "
            "'text_to_video' can be averaged (a VAE's weights are in its run's folder `vae`)"
        )
    task, mesh = experiment.task, MeshOptions().build()
    abstract, _ = abstract_state(task, optax.identity(), mesh)
    step, params = averaged_weights(
        arguments.checkpoint, abstract.params, arguments.sigma_rel, arguments.step
    )
    _, _, buffers = restore_averaged(arguments.checkpoint, abstract, abstract_base(task, mesh))
    arguments.out.mkdir(parents=True)
    shutil.copy(arguments.checkpoint / "config.json", arguments.out)
    for folder in ("vae", "base"):
        if (arguments.checkpoint / folder).exists():
            shutil.copytree(arguments.checkpoint / folder, arguments.out / folder)
    with CheckpointManager(arguments.out / "checkpoints") as checkpoints:
        checkpoints.save(step, {"ema": params, "buffers": buffers})
    print(f"{arguments.out}: weights at step {step}, averaged with sigma_rel {arguments.sigma_rel:g}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen average",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=path_option, help="workdir of a training run")
    parser.add_argument("--out", required=True, type=path_option, help="a new folder")
    parser.add_argument(
        "--sigma-rel",
        required=True,
        type=float,
        help="width of the average relative to the number of steps so far: 0.05 is short, 0.25 long",
    )
    parser.add_argument("--step", type=int, help="step of the snapshot (default: the newest)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
