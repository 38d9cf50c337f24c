"""`vidgen preflight`: checks, without a TPU, whether a training run or decoding a video fits a TPU slice."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core.config import ConfigError, resolve
from vidgen.preflight.topology import prepare_environment, topology_devices

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen preflight --config=experiments/vae/wan.py --topology=v5e:4x4
  vidgen preflight --config=experiments/dit/t2v_1b.py --vae=experiments/vae/wan.py --topology=v5p:2x2x4
  vidgen preflight --config=experiments/dit/sprites.py --config.task.vae=runs/vae --topology=v6e:2x2
  vidgen preflight --config=experiments/vae/wan.py --topology=v5e:2x4 --decode=1441x1080x1920

libtpu compiles the real training step for the slice; no TPU, weights or clips are needed. Any value of the
config can be changed with --config.section.key=value: --config.mesh.data=2 --config.mesh.fsdp=8. --decode
compiles the VAE's streaming decoder, with frames sharded over all devices, instead of the step. The last line
of the output is one JSON object. docs/tpu.md explains the numbers.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.

    Returns:
      0 if the step fits and its state keeps the requested sharding, otherwise 1.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    prepare_environment()  # Before jax is imported; configs import it.
    values = load_config(arguments.config, overrides)
    vae_values = load_config(arguments.vae, []) if arguments.vae else None
    devices = topology_devices(arguments.topology)

    from vidgen.preflight.compile import compile_step
    from vidgen.preflight.report import make_report
    from vidgen.train.experiment import Experiment

    if "path" in values["data"]:
        values["data"]["path"] = values["data"]["path"] or "unread"  # No clip is read.
    experiment = resolve(Experiment, values)
    vae = _vae_config(experiment.task, vae_values)
    if arguments.decode:
        from vidgen.preflight.decode import compile_decode

        report = compile_decode(vae, devices, arguments.decode, arguments.topology)
    else:
        mesh = experiment.mesh.build(devices)
        report = make_report(compile_step(experiment, mesh, vae), experiment, arguments.topology)
    if not arguments.json:
        print(report.table())
    print(report.to_json())
    return 0 if report.ok else 1


def _vae_config(task: Any, values: dict[str, Any] | None) -> Any:
    """Config of the VAE that the task trains, or of the frozen one: from its folder or its experiment."""
    from vidgen.models.video_vae.config import VAEConfig

    frozen = task.frozen()
    if "vae" in frozen and values is not None:
        return resolve(VAEConfig, values["task"]["model"], where="vae.task.model")
    try:
        return task.vae_config()
    except FileNotFoundError as error:
        raise ConfigError(
            f"config.task.vae: {frozen['vae'].source} holds no VAE. Correct the path, or give the experiment "
            "that trains the VAE: --vae=experiments/vae/wan.py"
        ) from error


def _video(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected frames, height and width, as 1441x1080x1920")
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen preflight",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="the experiment, as for `vidgen train`"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="the slice, such as v5e:4x4, v5p:2x2x4, v6e:8x8 or tpu7x:2x2x1",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE[:ARG]",
        help="the experiment that trains the frozen VAE, if config.task.vae is not on this machine",
    )
    parser.add_argument(
        "--decode",
        type=_video,
        metavar="TxHxW",
        help="compile the decoder for a video of this size instead, such as 1441x1080x1920",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
