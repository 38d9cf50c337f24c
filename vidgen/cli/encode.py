"""`vidgen encode`: encodes a video of any duration as latents of a VAE, group by group."""

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

A height or width that is no multiple of the VAE's factor is padded by repeating the last row or column, and
an incomplete last group by repeating the last frame; `vidgen decode` crops the padding. clip.json describes
the video and the VAE.
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

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
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
    factor, frame_tiles = vae.config.spatial_factor, tiles(arguments, vae.config.spatial_factor)
    fps = arguments.fps or info.fps or 1.0
    num_frames, height, width = 0, 0, 0

    def padded_frames() -> Iterator[np.ndarray]:
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
        padded = padded_frames()
        first = next(padded)
        latent_size = (first.shape[1] // factor, first.shape[2] // factor)
        with on_all_devices(vae, *latent_size) as sharded:
            all_frames = itertools.chain([first], padded)
            stream = encode_stream(sharded, all_frames, group=arguments.group, tiles=frame_tiles)
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
    parser.add_argument(
        "--vae", required=True, type=path_option, help="workdir of a run, or a diffusers checkpoint"
    )
    parser.add_argument("--out", required=True, type=path_option, help="file for the latents (.safetensors)")
    parser.add_argument(
        "--fps", type=limits.FPS, help="frames per second to encode (default: the video's frame rate)"
    )
    parser.add_argument("--height", type=limits.SIDE, help="pixels (default: the video's height)")
    parser.add_argument("--width", type=limits.SIDE, help="pixels (default: the video's width)")
    add_frame_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
