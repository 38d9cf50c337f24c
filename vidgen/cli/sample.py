"""`vidgen sample`: generates videos from prompts and images with a trained run or a checkpoint of Wan."""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidgen.cli.main import run
from vidgen.core import limits
from vidgen.core.config import to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import check_target, read_lines, require_text
from vidgen.core.limits import PIXELS, SEED
from vidgen.core.logging import get_logger
from vidgen.core.paths import path_option

if TYPE_CHECKING:
    from vidgen.pipeline import Pipeline, Progress

__all__ = ["main"]

_STORED = (
    "guidance",
    "guidance_interval",
    "cache_threshold",
    "image",
    "last_image",
    "lora",
    "lora_scale",
    "extra",
)
"""Options that are stored with the video if they are set."""
_EVERY = 10.0
"""Seconds between progress lines."""

_log = get_logger(__name__)

_EPILOG = """\
examples:
  vidgen sample --checkpoint runs/dit --prompt "a red circle moving left on a blue background" --out a.mp4
  vidgen sample --checkpoint runs/dit --prompt-file prompts.txt --out samples.mp4   (samples-000.mp4, ...)

The file's suffix selects the format: .mp4 (H.264), .gif or .png. All settings of a video are stored in it as
JSON under "vidgen". Progress is logged to stderr; VIDGEN_LOG=warning silences it.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    prompts = _prompts(arguments)
    require_text(arguments.negative_prompt, "--negative-prompt")
    targets = _targets(arguments.out, len(prompts))
    _check(arguments, len(prompts))

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    from vidgen.data.video_io import save_video
    from vidgen.pipeline import Request, load

    given = _options(arguments)
    start_time = time.monotonic()
    _log.info("loading %s", arguments.checkpoint)
    pipeline = load(arguments.checkpoint, dtype=arguments.dtype, cache=arguments.text_cache)
    for path in arguments.lora or ():
        pipeline.add_lora(path, scale=1.0 if arguments.lora_scale is None else arguments.lora_scale)
    _log.info("loaded in %.1f s", time.monotonic() - start_time)
    asked = (arguments.num_frames, arguments.height, arguments.width)
    size = [d if g is None else g for g, d in zip(asked, pipeline.size, strict=True)]
    fps = arguments.fps or pipeline.fps
    settings: dict[str, Any] = {"num_frames": size[0], "height": size[1], "width": size[2]}
    recorded = _recorded_options(pipeline, given, arguments) | {"fps": fps}
    for start in range(0, len(prompts), arguments.batch_size):
        start_time = time.monotonic()
        chunk = prompts[start : start + arguments.batch_size]
        request = Request(
            prompt=chunk,
            negative_prompt=arguments.negative_prompt,
            seed=arguments.seed + start,
            **settings,
            **given,
        )
        report, videos = _Reporter(start, len(chunk), len(prompts)), None
        for progress in pipeline.stream(request):
            report(progress)
            videos = progress.videos
        assert videos is not None  # The last event has them.
        for index, video in enumerate(videos, start):
            about = settings | recorded | {"prompt": prompts[index], "seed": arguments.seed + index}
            save_video(targets[index], video, fps=fps, metadata={"vidgen": json.dumps(about, default=str)})
            print(targets[index], flush=True)
        frames, height, width = videos[0].shape[:3]
        _log.info(
            "wrote %s (%d frames of %d x %d) in %.1f s",
            f"{targets[start]}" if len(chunk) == 1 else f"{len(chunk)} videos",
            frames,
            height,
            width,
            time.monotonic() - start_time,
        )
    return 0


class _Reporter:
    """Logs the sampler's progress: at the first steps, then every ten seconds."""

    def __init__(self, start: int, count: int, total: int):
        """Reports on prompts `start` to `start + count` out of `total`."""
        self._prompts = "" if count == total else f"prompts {start + 1} to {start + count} of {total}: "
        self._begun = self._last = self._second = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        now, (stage, done, count, _) = time.monotonic(), progress
        where = f"{self._prompts}step {done} of {count}"
        if stage == "done":
            return
        if stage == "decoding":
            _log.info("%s; decoding", where)
        elif done == 0:
            _log.info("%s; compiling, or reading the program from JAX_COMPILATION_CACHE_DIR", where)
        elif done == 1:
            self._second = self._last = now
            _log.info("%s after %.1f s, compiling included", where, now - self._begun)
        elif now - self._last >= _EVERY:
            # The first step compiles, so its duration is left out of the mean.
            each, self._last = (now - self._second) / (done - 1), now
            _log.info("%s, %.2f s a step, %.0f s left", where, each, each * (count - done))


def _recorded_options(
    pipeline: "Pipeline", given: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Options to store with the videos, under the names of the pipeline's arguments where it has them."""
    from vidgen.pipeline import Request

    options = Request(prompt="", **given).options(pipeline.options)
    made = {
        "negative_prompt": arguments.negative_prompt,
        "steps": options.grid.num_steps,
        "guidance_scale": options.guidance_scale,
        "guidance_scale_2": options.guidance_scale_2,
        "shift": to_dict(options.grid.shift),
        "stepper": getattr(options.stepper, "kind", None) or str(options.stepper),
        "convention": None if options.grid.convention == "even" else options.grid.convention,
        "checkpoint": str(arguments.checkpoint),
    } | {name: getattr(arguments, name) for name in _STORED}
    return {name: value for name, value in made.items() if value is not None}


def _check(arguments: argparse.Namespace, count: int) -> None:
    """Raises errors for wrong options and files before anything is loaded."""
    SEED.check(arguments.seed + count - 1, f"--seed of the last of {count} prompts")
    size = {name: getattr(arguments, name) for name in ("num_frames", "height", "width")}
    chosen = {name: value for name, value in size.items() if value is not None}
    shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    PIXELS.check(math.prod(chosen.values()), shown)
    for name in ("image", "last_image"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name.replace('_', '-')} {path}: there is no such image")
        if path is not None:
            _check_image(path)
    for path in arguments.lora or ():
        if not path.is_file():
            raise FileNotFoundError(f"--lora {path}: there is no such file")
    cache = arguments.text_cache
    if cache is not None and cache.exists() and not cache.is_dir():
        raise UserError(f"--text-cache {cache} is a file: give a folder")
    if arguments.lora_scale is not None and not arguments.lora:
        raise UserError("--lora-scale is for --lora: give one, or leave it out")


def _check_image(path: pathlib.Path) -> None:
    from vidgen.data.image_reader import read_image
    from vidgen.data.source import BrokenClip

    try:
        read_image(path, size=None)
    except BrokenClip as error:
        raise UserError(str(error)) from error


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the pipeline that were set; wrong values raise before the pipeline is loaded."""
    from vidgen.sampling.caching import TeaCache
    from vidgen.sampling.guidance import GUIDANCES
    from vidgen.sampling.options import SamplingOptions
    from vidgen.sampling.steppers import STEPPERS

    plain = ("steps", "shift", "convention", "guidance_scale", "guidance_scale_2", "image", "last_image")
    threshold, interval = arguments.cache_threshold, arguments.guidance_interval
    options = {name: getattr(arguments, name) for name in plain} | {
        "stepper": None if arguments.stepper is None else STEPPERS[arguments.stepper],
        "guidance": None if arguments.guidance is None else GUIDANCES[arguments.guidance],
        "guidance_interval": None if interval is None else tuple(interval),
        "cache": None if threshold is None else TeaCache(threshold=threshold),
    }
    SamplingOptions(guidance_interval=options["guidance_interval"] or (0.0, 1.0))
    options["extras"] = dict(map(_extra, arguments.extra or ())) or None
    return {name: value for name, value in options.items() if value is not None}


def _extra(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"--extra {text}: expected NAME=JSON, for instance --extra palette=[1,0,0]")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise UserError(f"--extra {text}: {error}; quote strings as JSON does") from error


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [require_text(arguments.prompt, "--prompt")]
    lines = read_lines(arguments.prompt_file)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{arguments.prompt_file} holds no prompt: write one per line")
    return prompts


def _targets(out: pathlib.Path, count: int) -> list[pathlib.Path]:
    """`out` for one video, otherwise numbered names in its folder; each is checked to be writable."""
    from vidgen.data.video_writer import SUPPORTED_SUFFIXES

    if out.suffix.lower() not in SUPPORTED_SUFFIXES:
        valid = ", ".join(SUPPORTED_SUFFIXES)
        raise UserError(f'--out {out}: cannot write "{out.suffix}"; use one of {valid}')
    digits = max(3, len(str(count - 1)))
    names = [f"{out.stem}-{index:0{digits}}{out.suffix}" for index in range(count)]
    targets = [out] if count == 1 else [out.with_name(name) for name in names]
    for target in targets:
        check_target(target)
    return targets


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
        help="workdir of a training run, or a checkpoint of Wan in diffusers' layout",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="text that describes the video")
    prompts.add_argument("--prompt-file", type=path_option, help="text file with one prompt per line")
    parser.add_argument("--negative-prompt", default="", help="text that guidance steers away from")
    parser.add_argument("--out", required=True, type=path_option, help="file to write: .mp4, .gif or .png")
    images = parser.add_argument_group("images", "for image-to-video models")
    images.add_argument("--image", type=path_option, help="image file of the first frame")
    images.add_argument("--last-image", type=path_option, help="image file of the last frame")
    size = parser.add_argument_group("size", "default: the size of training")
    size.add_argument("--num-frames", type=limits.NUM_FRAMES, help="1 + 4 n; 1 generates an image")
    size.add_argument("--height", type=limits.SIDE, help="pixels")
    size.add_argument("--width", type=limits.SIDE, help="pixels")
    size.add_argument("--fps", type=limits.FPS, help="frames per second written to the file")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of matrix products")
    weights.add_argument(
        "--lora",
        type=path_option,
        action="append",
        help="LoRA file (.safetensors) with PEFT's or ComfyUI's names; may be repeated",
    )
    weights.add_argument("--lora-scale", type=limits.LORA_SCALE, help="scale of the LoRA weights (default 1)")
    weights.add_argument("--text-cache", type=path_option, help="folder that caches prompt features")
    parser.add_argument(
        "--extra",
        action="append",
        metavar="NAME=JSON",
        help="input of a conditioner of the run's author; may be repeated",
    )
    sampler = parser.add_argument_group("sampler", "default: as the model was published or trained")
    sampler.add_argument("--steps", type=limits.SAMPLER_STEPS, help="sampler steps")
    sampler.add_argument("--guidance-scale", type=limits.GUIDANCE_SCALE, help="1 turns guidance off")
    sampler.add_argument(
        "--guidance-scale-2",
        type=limits.GUIDANCE_SCALE,
        help="scale for the low-noise transformer of a model with two (default: --guidance-scale)",
    )
    sampler.add_argument(
        "--guidance", choices=("cfg", "cfg_zero_star", "apg"), help="guidance rule (default cfg)"
    )
    sampler.add_argument(
        "--guidance-interval",
        nargs=2,
        type=limits.TIMESTEP,
        metavar=("LOW", "HIGH"),
        help="timesteps, from 0 (data) to 1 (noise), with guidance; a step outside costs half (default 0 1)",
    )
    sampler.add_argument(
        "--cache-threshold",
        type=limits.NON_NEGATIVE,
        help="threshold of TeaCache, which skips the transformer's blocks in similar steps; try 0.1",
    )
    sampler.add_argument("--shift", type=limits.SHIFT, help="shift of timesteps towards noise; 1 is none")
    sampler.add_argument("--stepper", choices=("dpm_solver", "unipc", "heun", "euler"), help="solver")
    sampler.add_argument(
        "--convention",
        choices=("even", "unipc", "wan", "flow_match_euler"),
        help="timesteps: evenly spaced, as in diffusers' schedulers, or as in Wan's own program",
    )
    sampler.add_argument(
        "--seed", type=limits.SEED, default=0, help="seed of the first prompt; the next gets seed + 1"
    )
    sampler.add_argument("--batch-size", type=limits.BATCH_SIZE, default=8, help="prompts per batch")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
