"""`vidgen sample`: videos from prompts, and images, by a trained run or a checkpoint of Wan."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from vidgen.cli.main import run
from vidgen.core.config import to_dict
from vidgen.core.errors import UserError
from vidgen.core.paths import path_option

__all__ = ["main"]

_SAMPLER = (
    "guidance_scale_2",
    "guidance",
    "guidance_interval",
    "cache_threshold",
    "image",
    "last_image",
    "lora",
)
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
        raise UserError(f"--batch-size is {arguments.batch_size}: give at least 1")
    if arguments.fps is not None and arguments.fps <= 0:
        raise UserError(f"--fps is {arguments.fps}: give a positive number")
    prompts = _prompts(arguments)
    targets = _targets(arguments.out, len(prompts))

    # What needs jax is imported late: --help and wrong options answer at once.
    from vidgen.data.video_io import save_video
    from vidgen.pipeline import load

    options = _options(arguments)
    pipeline = load(arguments.checkpoint, dtype=arguments.dtype, cache=arguments.text_cache)
    for path in arguments.lora or ():
        pipeline.add_lora(path, scale=arguments.lora_scale)
    given = (arguments.num_frames, arguments.height, arguments.width)
    size = [d if g is None else g for g, d in zip(given, pipeline.size, strict=True)]
    fps = arguments.fps or pipeline.fps
    settings: dict[str, Any] = {"num_frames": size[0], "height": size[1], "width": size[2]}
    made_how = {
        "negative_prompt": arguments.negative_prompt,
        "steps": arguments.steps or pipeline.options.grid.num_steps,
        "guidance_scale": options.get("guidance_scale", pipeline.options.guidance_scale),
        "shift": to_dict(options.get("shift", pipeline.options.grid.shift)),
        "stepper": arguments.stepper or pipeline.options.stepper.kind,
        "fps": fps,
        "checkpoint": str(arguments.checkpoint),
    } | {name: value for name in _SAMPLER if (value := getattr(arguments, name)) is not None}
    for start in range(0, len(prompts), arguments.batch_size):
        chunk = prompts[start : start + arguments.batch_size]
        seed = arguments.seed + start
        videos = pipeline(chunk, negative_prompt=arguments.negative_prompt, seed=seed, **settings, **options)
        for index, video in enumerate(videos, start):
            made_by = settings | made_how | {"prompt": prompts[index], "seed": arguments.seed + index}
            save_video(targets[index], video, fps=fps, metadata={"vidgen": json.dumps(made_by, default=str)})
            print(targets[index])
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with, where it was given; wrong values are found before it is loaded."""
    from vidgen.sampling.caching import TeaCache
    from vidgen.sampling.guidance import GUIDANCES
    from vidgen.sampling.options import SamplingOptions
    from vidgen.sampling.steppers import STEPPERS
    from vidgen.sampling.time_grid import TimeGrid

    plain = ("steps", "shift", "guidance_scale", "guidance_scale_2", "image", "last_image")
    threshold, interval = arguments.cache_threshold, arguments.guidance_interval
    options = {name: getattr(arguments, name) for name in plain} | {
        "stepper": None if arguments.stepper is None else STEPPERS[arguments.stepper],
        "guidance": None if arguments.guidance is None else GUIDANCES[arguments.guidance],
        "guidance_interval": None if interval is None else tuple(interval),
        "cache": None if threshold is None else TeaCache(threshold=threshold),
    }
    options = {name: value for name, value in options.items() if value is not None}
    TimeGrid(num_steps=options.get("steps", 1), shift=options.get("shift", 1.0))
    SamplingOptions(guidance_interval=options.get("guidance_interval", (0.0, 1.0)))
    return options


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [arguments.prompt]
    lines = arguments.prompt_file.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{arguments.prompt_file} holds no prompt: write one per line")
    return prompts


def _targets(out: pathlib.Path, count: int) -> list[pathlib.Path]:
    """`out` itself, or numbered names beside it; checked before anything is computed."""
    from vidgen.data.video_writer import SUPPORTED_SUFFIXES

    if out.suffix.lower() not in SUPPORTED_SUFFIXES:
        valid = ", ".join(SUPPORTED_SUFFIXES)
        raise UserError(f'--out {out}: cannot write "{out.suffix}"; use one of {valid}')
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
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_option,
        help="workdir of a training run, or a checkpoint of Wan for diffusers",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--prompt-file", type=path_option, help="one prompt per line")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--out", required=True, type=path_option, help=".mp4, .gif or .png")
    images = parser.add_argument_group("images", "for models that make videos of them")
    images.add_argument("--image", type=path_option, help="the first frame")
    images.add_argument("--last-image", type=path_option, help="the last frame")
    size = parser.add_argument_group("size", "by default that of training")
    size.add_argument("--num-frames", type=int, help="1 + 4 n; 1 makes an image")
    size.add_argument("--height", type=int, help="pixels")
    size.add_argument("--width", type=int, help="pixels")
    size.add_argument("--fps", type=float, help="frames per second written to the file")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products")
    weights.add_argument(
        "--lora", type=path_option, action="append", help="safetensors, of PEFT or ComfyUI; may be repeated"
    )
    weights.add_argument("--lora-scale", type=float, default=1.0)
    weights.add_argument("--text-cache", type=path_option, help="folder that keeps features of prompts")
    sampler = parser.add_argument_group("sampler", "by default as the model was published or trained")
    sampler.add_argument("--steps", type=int)
    sampler.add_argument("--guidance-scale", type=float, help="1 is none")
    sampler.add_argument(
        "--guidance-scale-2", type=float, help="of the second transformer, for models with two"
    )
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
    sampler.add_argument("--shift", type=float, help="of timesteps towards noise; 1 is none")
    sampler.add_argument("--stepper", choices=("dpm_solver", "unipc", "heun", "euler"))
    sampler.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has seed + 1")
    sampler.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
