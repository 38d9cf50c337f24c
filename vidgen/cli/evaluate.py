"""`vidgen evaluate`: scores a VAE's reconstructions, or a video model's agreement with its prompts."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidgen.cli.main import run
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import path_option

__all__ = ["main"]

_PROMPTS = 200
_VAE_OPTIONS = ("videos", "fps", "height", "width", "lpips", "i3d", "side_by_side")
"""Options that apply to a VAE only."""

_EPILOG = """\
examples:
  vidgen evaluate --checkpoint runs/vae --num-clips 64
  vidgen evaluate --checkpoint runs/vae --videos my_clips --lpips lpips.safetensors --i3d i3d.safetensors \\
    --side-by-side beside --json scores.json
  vidgen evaluate --checkpoint Wan2.1-T2V-1.3B-Diffusers --videos clip.mp4 --height 480 --width 832
  vidgen evaluate --checkpoint runs/dit --num-clips 200 --json scores.json

Clips and prompts are held out: sprites show pairs of colour and shape that no training clip has.

Scores of a VAE: PSNR (dB), SSIM and flicker, the difference (in 8-bit levels) between the frame-to-frame
changes of the reconstruction and of the original. Each is a mean over all frames of whole videos. LPIPS and
rFVD (the Frechet video distance of reconstructions from originals) need the weights of their networks;
docs/evaluation.md says how to write them. Files that cannot be read are listed and skipped.

Scores of a video model: `real` runs the same detectors on real clips of the same scenes, an upper bound.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    from vidgen.cli.evaluate_vae import evaluate_vae, video_files

    if arguments.videos:
        video_files(arguments.videos)
    experiment, step, model = _load(arguments.checkpoint)
    if experiment is None or experiment.task.scores == "reconstructions":
        scores = evaluate_vae(model, experiment, arguments)
    else:
        given = [name for name in _VAE_OPTIONS if getattr(arguments, name) is not None]
        if given:
            raise UserError(
                f"{arguments.checkpoint} is no VAE: {_option(given[0])} is for a VAE's reconstructions"
            )
        scores = _alignment(experiment, arguments)
    result = {"checkpoint": str(arguments.checkpoint), "step": step, **scores}
    print(json.dumps({name: value for name, value in result.items() if name != "videos"}))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if result.get("rfvd", 0.0) is None:
        raise UserError(
            f"rFVD needs at least 2 clips of {arguments.clip_frames} frames, found {result['rfvd_clips']}: "
            "give more or longer videos, or a smaller --clip-frames"
        )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other or the files."""
    if arguments.json is not None:
        check_target(arguments.json)
    beside = arguments.side_by_side
    if beside is not None and beside.exists() and not beside.is_dir():
        raise UserError(f"--side-by-side {beside} is a file: give a folder")
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("give both --height and --width, or none of them")
    for name in ("fps", "height", "width"):
        if getattr(arguments, name) is not None and not arguments.videos:
            raise UserError(
                f"{_option(name)} is for --videos: the run's config sets the size of held-out clips"
            )
    if arguments.side_by_side and arguments.videos:
        videos, beside = arguments.videos.resolve(), arguments.side_by_side.resolve()
        # The next call would take files in the folder of videos for videos to score.
        if beside == videos.parent if videos.is_file() else beside.is_relative_to(videos):
            raise UserError(
                f"--side-by-side {arguments.side_by_side} is among the videos: give another folder"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _load(checkpoint: pathlib.Path) -> tuple[Any, int | None, Any]:
    """Experiment, step and model of a run; (None, None, model) for a VAE alone."""
    from vidgen.models.video_vae.diffusers_folder import is_diffusers
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.train.restore import load_run
    from vidgen.train.vae_folder import has_vae, load_vae

    is_run = (checkpoint / "config.json").exists() and not is_diffusers(checkpoint)
    if has_vae(checkpoint) and not is_run:
        return None, None, load_vae(checkpoint)
    return load_run(checkpoint, MeshOptions().build())


def _alignment(experiment, arguments: argparse.Namespace) -> dict:
    from vidgen.evals.alignment import evaluate_alignment, format_alignment, score_alignment
    from vidgen.pipeline import load

    data = experiment.data.clips
    source = data.heldout_scenes()
    if source is None:
        raise UserError(
            f"{arguments.checkpoint} was trained on data of kind {data.kind!r}: prompt alignment "
            "is measured in the sprite world only. Sample from it with `vidgen sample`"
        )
    scenes = [source.scene(index) for index in range(arguments.num_clips or _PROMPTS)]
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
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_option,
        help="workdir of a run, or a VAE in diffusers' layout",
    )
    parser.add_argument(
        "--num-clips",
        type=limits.COUNT,
        help="number of clips or prompts (default 200), or of files in --videos (default all)",
    )
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the scores to this file too")
    vae = parser.add_argument_group("options for a VAE")
    vae.add_argument(
        "--videos", type=path_option, help="a folder or a file, instead of the run's held-out clips"
    )
    vae.add_argument(
        "--fps", type=limits.FPS, help="frames per second read from --videos (default: each file's rate)"
    )
    vae.add_argument(
        "--height", type=limits.SIDE, help="resize --videos to this many pixels (default: each file's height)"
    )
    vae.add_argument("--width", type=limits.SIDE, help="as --height")
    vae.add_argument(
        "--lpips", type=path_option, metavar="FILE", help="weights of VGG16-LPIPS (.safetensors)"
    )
    vae.add_argument(
        "--i3d", type=path_option, metavar="FILE", help="weights of I3D, for rFVD (.safetensors)"
    )
    vae.add_argument(
        "--clip-frames",
        type=limits.NUM_FRAMES,
        default=16,
        help="frames per rFVD clip (default 16), at least 9",
    )
    vae.add_argument(
        "--side-by-side",
        type=path_option,
        metavar="DIR",
        help="write each video next to its reconstruction to this folder",
    )
    vae.add_argument("--group", type=limits.COUNT, default=1, help="latent frames per call (default 1)")
    sampler = parser.add_argument_group("options for a video model")
    sampler.add_argument(
        "--batch-size", type=limits.BATCH_SIZE, default=20, help="prompts per batch (default 20)"
    )
    sampler.add_argument("--steps", type=limits.SAMPLER_STEPS, help="sampler steps (default: the run's)")
    sampler.add_argument(
        "--guidance-scale", type=limits.GUIDANCE_SCALE, help="1 turns guidance off (default: the run's)"
    )
    sampler.add_argument(
        "--seed", type=limits.SEED, default=0, help="seed of the first prompt; the next gets seed + 1"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
