"""`vidgen sample`: videos from prompts, by a trained run."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidgen.cli.main import run

if TYPE_CHECKING:
    from vidgen.sampling.generate import SamplingOptions

__all__ = ["main"]

_SAMPLER = ("guidance", "guidance_interval", "cache_threshold")
"""Options that are stored with the video where they were given."""

_EPILOG = """\
examples:
  vidgen sample --checkpoint runs/dit --prompt "a red circle moving left on a blue background" --out a.mp4
  vidgen sample --checkpoint runs/dit --prompt-file prompts.txt --out samples.mp4   (samples-000.mp4, ...)

The file's ending chooses the format: .mp4 (H.264), .gif or .png. Everything that made a video is stored in it
as JSON under "vidgen".
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}: give at least 1")
    if arguments.fps is not None and arguments.fps <= 0:
        raise ValueError(f"--fps is {arguments.fps}: give a positive number")
    prompts = _prompts(arguments)
    targets = _targets(arguments.out, len(prompts))

    # What needs jax is imported late: --help and wrong options answer at once.
    import jax

    from vidgen.data.video_io import save_video
    from vidgen.pipeline import load
    from vidgen.sampling.generate import generate

    options = _options(arguments)
    pipeline = load(arguments.checkpoint)
    given = (arguments.num_frames, arguments.height, arguments.width)
    size = [d if g is None else g for g, d in zip(given, pipeline.size, strict=True)]
    fps = arguments.fps or pipeline.fps
    settings: dict[str, Any] = {
        "negative_prompt": arguments.negative_prompt,
        "num_frames": size[0],
        "height": size[1],
        "width": size[2],
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "shift": arguments.shift,
    }
    made_how = {"stepper": arguments.stepper} | {
        name: getattr(arguments, name) for name in _SAMPLER if getattr(arguments, name) is not None
    }
    for start in range(0, len(prompts), arguments.batch_size):
        chunk = prompts[start : start + arguments.batch_size]
        first = arguments.seed + start
        with jax.set_mesh(pipeline.mesh):
            videos = generate(
                pipeline.model,
                pipeline.vae,
                chunk,
                size=(size[0], size[1], size[2]),
                seeds=range(first, first + len(chunk)),
                negative_prompt=arguments.negative_prompt,
                options=options,
            )
        for index, video in enumerate(videos, start):
            made_by = (
                settings
                | made_how
                | {
                    "prompt": prompts[index],
                    "seed": arguments.seed + index,
                    "fps": fps,
                    "checkpoint": str(arguments.checkpoint),
                }
            )
            save_video(targets[index], video, fps=fps, metadata={"vidgen": json.dumps(made_by)})
            print(targets[index])
    return 0


def _options(arguments: argparse.Namespace) -> "SamplingOptions":
    """How the sampler goes; wrong values are found before anything is loaded."""
    from vidgen.sampling.caching import TeaCache
    from vidgen.sampling.generate import SamplingOptions
    from vidgen.sampling.guidance import GUIDANCES
    from vidgen.sampling.steppers import STEPPERS, UniPC
    from vidgen.sampling.time_grid import TimeGrid

    stepper = STEPPERS[arguments.stepper]
    convention = "unipc" if isinstance(stepper, UniPC) else "even"
    threshold = arguments.cache_threshold
    low, high = arguments.guidance_interval or (0.0, 1.0)
    return SamplingOptions(
        grid=TimeGrid(num_steps=arguments.steps, shift=arguments.shift, convention=convention),
        stepper=stepper,
        guidance_scale=arguments.guidance_scale,
        guidance=GUIDANCES[arguments.guidance or "cfg"],
        guidance_interval=(low, high),
        cache=None if threshold is None else TeaCache(threshold=threshold),
    )


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [arguments.prompt]
    lines = arguments.prompt_file.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{arguments.prompt_file} holds no prompt: write one per line")
    return prompts


def _targets(out: pathlib.Path, count: int) -> list[pathlib.Path]:
    """`out` itself, or numbered names beside it; checked before anything is computed."""
    from vidgen.data.video_writer import SUPPORTED_SUFFIXES

    if out.suffix.lower() not in SUPPORTED_SUFFIXES:
        valid = ", ".join(SUPPORTED_SUFFIXES)
        raise ValueError(f'--out {out}: cannot write "{out.suffix}"; use one of {valid}')
    if count == 1:
        return [out]
    digits = max(3, len(str(count - 1)))
    return [out.with_name(f"{out.stem}-{index:0{digits}}{out.suffix}") for index in range(count)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen sample",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="workdir of a training run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--prompt-file", type=pathlib.Path, help="one prompt per line")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--out", required=True, type=pathlib.Path, help=".mp4, .gif or .png")
    size = parser.add_argument_group("size", "by default that of training")
    size.add_argument("--num-frames", type=int, help="1 + 4 n; 1 makes an image")
    size.add_argument("--height", type=int, help="pixels")
    size.add_argument("--width", type=int, help="pixels")
    size.add_argument("--fps", type=float, help="frames per second written to the file")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--steps", type=int, default=30)
    sampler.add_argument("--guidance-scale", type=float, default=4.0, help="1 is none; default 4")
    sampler.add_argument("--guidance", choices=("cfg", "cfg_zero_star", "apg"), help="default cfg")
    sampler.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="timesteps, from 0 (data) to 1 (noise), with guidance; elsewhere a step costs half; default 0 1",
    )
    sampler.add_argument(
        "--cache-threshold",
        type=float,
        help="of TeaCache, which skips most of the transformer in steps like the last; 0.1 is a start",
    )
    sampler.add_argument("--shift", type=float, default=1.0, help="of timesteps towards noise; default 1")
    sampler.add_argument("--stepper", choices=("dpm_solver", "unipc", "heun", "euler"), default="dpm_solver")
    sampler.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has seed + 1")
    sampler.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
