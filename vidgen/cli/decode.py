"""`vidgen decode`: decodes latents to a video of any duration, group by group."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from vidgen.cli.frame_options import add_frame_options, check_frame_options, on_all_devices, tiles
from vidgen.cli.main import run
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import path_option

__all__ = ["main"]

_EPILOG = """\
example:
  vidgen decode clip.safetensors --out clip_decoded.mp4

The default VAE is the one that `vidgen encode` used. The output has as many frames as the encoded video, of
the same size; an MP4 with an odd side gets one more row or column, because H.264's 4:2:0 needs even sides.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)
    check_frame_options(arguments)
    if arguments.out.suffix.lower() not in (suffixes := (".mp4", ".gif", ".png")):
        raise UserError(f"--out {arguments.out}: use one of {', '.join(suffixes)}")
    check_target(arguments.out)

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    import jax.numpy as jnp
    from tqdm import tqdm

    from vidgen.core import pixels
    from vidgen.data.latents_file import load_latents
    from vidgen.data.video_io import save_frames
    from vidgen.models.video_vae.model import VideoVAE
    from vidgen.models.video_vae.streaming import decode_stream
    from vidgen.train.vae_folder import load_vae

    latents, info = load_latents(arguments.latents)
    folder = arguments.vae or pathlib.Path(info.vae)
    vae = load_vae(folder)
    found = (info.spatial_factor, info.temporal_factor, latents.shape[-1])
    expected = (vae.config.spatial_factor, vae.config.temporal_factor, vae.config.latent_channels)
    if found != expected:
        raise UserError(
            f"{arguments.latents} has (spatial factor, temporal factor, channels) {found}, the VAE in "
            f"{folder} {expected}: give the VAE of these latents with --vae"
        )

    frame_tiles = tiles(arguments, vae.config.spatial_factor)

    def frames(sharded: VideoVAE) -> Iterator[np.ndarray]:
        count = 0
        starts = range(1, len(latents), arguments.group)
        blocks = map(jnp.asarray, np.split(latents[None], starts, axis=1))
        with tqdm(total=info.num_frames, unit="frame", dynamic_ncols=True, file=sys.stderr) as bar:
            for block in decode_stream(sharded, blocks, num_frames=info.num_frames, tiles=frame_tiles):
                finite = np.asarray(jnp.isfinite(block).all((0, 2, 3, 4)))
                if not finite.all():
                    raise UserError(
                        f"{arguments.latents} decoded by {folder}: frame {count + np.argmin(finite)} is not "
                        "finite. The VAE's weights may be damaged"
                    )
                for frame in np.asarray(pixels.to_uint8(block))[0]:
                    bar.update()
                    yield frame[: info.height, : info.width]
                count += len(finite)

    made_by = {"latents": str(arguments.latents), "vae": str(folder)}
    with on_all_devices(vae, *latents.shape[1:3]) as sharded:
        save_frames(arguments.out, frames(sharded), fps=info.fps, metadata={"vidgen": json.dumps(made_by)})
    print(arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen decode",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("latents", type=path_option, help="file written by `vidgen encode` (.safetensors)")
    parser.add_argument("--vae", type=path_option, help="workdir of a run, or a diffusers checkpoint")
    parser.add_argument("--out", required=True, type=path_option, help=".mp4, .gif or .png")
    add_frame_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
