"""Options of `vidgen encode` and `vidgen decode`: frames sharded over all devices, or tiled on one device."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vidgen.core import limits
from vidgen.core.errors import UserError

if TYPE_CHECKING:
    from vidgen.models.video_vae.model import VideoVAE
    from vidgen.models.video_vae.tiling import Tiles

__all__ = ["add_frame_options", "check_frame_options", "on_all_devices", "tiles"]


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--group`, `--tile` and `--overlap`."""
    parser.add_argument("--group", type=int, default=1, help="latent frames per call (default 1)")
    parser.add_argument(
        "--tile",
        type=limits.SIDE,
        metavar="PIXELS",
        help="side of the tiles, computed one after another and blended, for a device with little memory; by "
        "default frames are not tiled but sharded over all devices, which leaves no seams",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="overlap of tiles (default: a quarter of --tile)"
    )


def check_frame_options(arguments: argparse.Namespace) -> None:
    """Checks the options that need no model.

    Raises:
      UserError: names the wrong option.
    """
    limits.NUM_FRAMES.check(arguments.group, "--group")
    if arguments.overlap is not None and arguments.tile is None:
        raise UserError("--overlap is of tiles: give --tile too, or neither")


def tiles(arguments: argparse.Namespace, factor: int) -> "Tiles | None":
    """Tiles, in latent pixels, from `--tile` and `--overlap` (pixels); None without `--tile`.

    Args:
      factor: pixels per latent pixel, along height and width.

    Raises:
      UserError: a size is no multiple of the factor, or the overlap is too large for the tile.
    """
    from vidgen.models.video_vae.tiling import Tiles

    if arguments.tile is None:
        return None
    sizes = {"tile": arguments.tile, "overlap": arguments.overlap}
    for name, size in sizes.items():
        if size is not None and (size < 0 or size % factor):
            raise UserError(
                f"--{name} {size}: give a multiple of {factor}, the VAE's pixels per latent pixel"
            )
    side = arguments.tile // factor
    overlap = side // 4 if arguments.overlap is None else arguments.overlap // factor
    return Tiles(height=side, width=side, overlap=overlap)


@contextlib.contextmanager
def on_all_devices(vae: "VideoVAE", height: int, width: int) -> Iterator["VideoVAE"]:
    """The VAE on this process's devices; within the context each frame is sharded over them.

    Args:
      height, width: of the latents, in latent pixels.
    """
    import jax

    from vidgen.parallel.mesh import frame_mesh
    from vidgen.parallel.rules import shardings

    devices = jax.local_devices()
    mesh = frame_mesh(len(devices), height, width).build(devices)
    with jax.set_mesh(mesh):
        yield jax.device_put(vae, shardings(vae, mesh))
