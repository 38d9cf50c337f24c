"""`vidgen encode`: a video to the latents of a VAE, group by group, whatever its duration."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from vidgen.cli.frame_options import add_frame_options, check_frame_options, on_all_devices, tiles
from vidgen.cli.main import run
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import path_option

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen encode clip.mp4 --vae runs/vae --out clip.safetensors
  vidgen encode clip.mp4 --vae Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --out clip.safetensors

Sides that the VAE does not divide are filled by repeating the last row and column, and a last group that
is not whole by repeating the last frame; `vidgen decode` crops them again. clip.json says what the latents
are of.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    check_frame_options(arguments)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out {arguments.out}: latents are written to .safetensors files")
    check_target(arguments.out)
    check_target(arguments.out.with_suffix(".json"))

    # What needs jax is imported late: --help and wrong options answer at once.
    from tqdm import tqdm

    from vidgen.data.latents_file import LatentsInfo, require_finite, save_latents
    from vidgen.data.source import BrokenClip
    from vidgen.data.video_io import probe, read_frames
    from vidgen.models.video_vae.streaming import encode_stream, fill_sides
    from vidgen.train.vae_folder import load_vae

    try:
        info = probe(arguments.video)
    except BrokenClip as error:
        raise UserError(str(error)) from error
    frames = read_frames(arguments.video, fps=arguments.fps, height=arguments.height, width=arguments.width)
    vae = load_vae(arguments.vae)
    factor, cut = vae.config.spatial_factor, tiles(arguments, vae.config.spatial_factor)
    fps = arguments.fps or info.fps or 1.0
    num_frames, height, width = 0, 0, 0

    def prepared() -> Iterator[np.ndarray]:
        nonlocal num_frames, height, width
        total = max(1, round(info.duration * fps))
        for frame in tqdm(frames, total=total, unit="frame", dynamic_ncols=True, file=sys.stderr):
            if num_frames and frame.shape[:2] != (height, width):
                raise UserError(
                    f"{arguments.video}: frame {num_frames} is {frame.shape[0]} x {frame.shape[1]}, those "
                    f"before it {height} x {width}: give --height and --width, and all are resized to that"
                )
            num_frames += 1
            height, width = frame.shape[:2]
            yield fill_sides(frame, factor)[None].astype(np.float32) / 127.5 - 1.0

    try:
        filled = prepared()
        first = next(filled)
        latent_size = (first.shape[1] // factor, first.shape[2] // factor)
        with on_all_devices(vae, *latent_size) as spread:
            frames_of_all = itertools.chain([first], filled)
            stream = encode_stream(spread, frames_of_all, group=arguments.group, tiles=cut)
            blocks = [np.asarray(block[0]) for block in stream]
    except BrokenClip as error:
        raise UserError(str(error)) from error
    latents = np.concatenate(blocks)
    require_finite(latents, vae.config.temporal_factor, f"{arguments.video} encoded by {arguments.vae}")
    about = LatentsInfo(
        num_frames=num_frames,
        height=height,
        width=width,
        fps=float(fps),
        vae=str(arguments.vae),
        spatial_factor=vae.config.spatial_factor,
        temporal_factor=vae.config.temporal_factor,
        source=str(arguments.video),
    )
    save_latents(arguments.out, latents, about)
    print(f"{arguments.out}: {num_frames} frames of {height} x {width} as latents {list(latents.shape)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen encode",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("video", type=path_option, help="a video or an image")
    parser.add_argument("--vae", required=True, type=path_option, help="a run, or a diffusers checkpoint")
    parser.add_argument("--out", required=True, type=path_option, help="file of latents (.safetensors)")
    parser.add_argument(
        "--fps", type=limits.FPS, help="frames per second to take; the file's own where not given"
    )
    parser.add_argument("--height", type=limits.SIDE, help="pixels; the file's own where not given")
    parser.add_argument("--width", type=limits.SIDE)
    add_frame_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
