"""`vidgen evaluate`: scores of a trained run: reconstruction of a VAE, prompt alignment of a video model."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from vidgen.cli.main import run

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen evaluate --checkpoint runs/vae --num-clips 64
  vidgen evaluate --checkpoint runs/dit --num-clips 200 --json scores.json

Clips and prompts are held out: sprites show pairs of colour and shape that no training clip has.
`real` are the same detectors on real clips of the same scenes, the best that a model can reach.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    for option in ("num_clips", "batch_size"):
        if getattr(arguments, option) < 1:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is {getattr(arguments, option)}: give at least 1")

    # What needs jax is imported late: --help and wrong options answer at once.
    from vidgen.models.video_vae.model import VideoVAE
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.train.trained import load_trained

    mesh = MeshOptions().build()
    experiment, step, model = load_trained(arguments.checkpoint, mesh)
    if isinstance(model, VideoVAE):
        scores = _reconstruction(experiment, model, arguments)
    else:
        scores = _alignment(experiment, arguments)
    result = {"checkpoint": str(arguments.checkpoint), "step": step, **scores}
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _reconstruction(experiment, vae, arguments: argparse.Namespace) -> dict:
    from vidgen.cli.evaluators import heldout_source
    from vidgen.data.loader import Loader
    from vidgen.evals.previews import reconstruct
    from vidgen.evals.quality import evaluate_reconstruction

    source = heldout_source(experiment)
    count = min(arguments.num_clips, len(source))
    size = min(arguments.batch_size, count)

    def batches() -> Iterator[np.ndarray]:
        with Loader(source, batch_size=size, seed=0, shuffle=False) as loader:
            for start in range(0, count, size):
                yield next(loader)["video"][: count - start]

    scores = evaluate_reconstruction(lambda video: reconstruct(vae, video), batches())
    psnr, ssim, clips = scores["psnr"], scores["ssim"], scores["num_clips"]
    print(f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f} over {clips:.0f} held-out clips")
    return scores


def _alignment(experiment, arguments: argparse.Namespace) -> dict:
    import dataclasses

    from vidgen.data.sprites.source import SpritesData
    from vidgen.evals.alignment import evaluate_alignment, format_alignment, score_alignment
    from vidgen.pipeline import load

    if not isinstance(experiment.data, SpritesData):
        raise ValueError(
            f"{arguments.checkpoint} was trained on data of kind {experiment.data.kind!r}: prompt alignment "
            "is measured in the sprite world only. Sample from it with `vidgen sample`"
        )
    source = dataclasses.replace(experiment.data, split="heldout").source()
    scenes = [source.scene(index) for index in range(arguments.num_clips)]
    pipeline = load(arguments.checkpoint)
    seeds = iter(range(arguments.seed, arguments.seed + len(scenes), arguments.batch_size))

    def generate(prompts: list[str]) -> np.ndarray:
        return pipeline(
            prompts, seed=next(seeds), steps=arguments.steps, guidance_scale=arguments.guidance_scale
        )

    generated = evaluate_alignment(generate, scenes, batch_size=arguments.batch_size)
    real = score_alignment(scenes, [source[index]["video"] for index in range(len(scenes))])
    print("generated\n" + format_alignment(generated))
    print("real\n" + format_alignment(real))
    return {"generated": generated, "real": real}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen evaluate",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="workdir of a training run")
    parser.add_argument("--num-clips", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="of the sampler")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the scores there too")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
