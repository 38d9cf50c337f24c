"""How `vidgen encode` and `vidgen decode` take frames: on all devices together, or tile by tile on one."""

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
    parser.add_argument("--group", type=int, default=1, help="latent frames computed at a time")
    parser.add_argument(
        "--tile",
        type=limits.SIDE,
        metavar="PIXELS",
        help="sides of tiles computed one after the other and blended, for a device with little memory; "
        "without, frames are taken whole, by all devices together, which leaves no seams",
    )
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles; a quarter of their sides")


def check_frame_options(arguments: argparse.Namespace) -> None:
    """What can be known before anything is loaded.

    Raises:
      UserError: names the option.
    """
    limits.NUM_FRAMES.check(arguments.group, "--group")
    if arguments.overlap is not None and arguments.tile is None:
        raise UserError("--overlap is of tiles: give --tile too, or neither")


def tiles(arguments: argparse.Namespace, factor: int) -> "Tiles | None":
    """The tiles asked for.

    Args:
      factor: pixels per latent pixel.

    Raises:
      UserError: sizes that are not multiples of the factor, or leave nothing between overlaps.
    """
    from vidgen.models.video_vae.tiling import Tiles

    if arguments.tile is None:
        return None
    given = {"tile": arguments.tile, "overlap": arguments.overlap}
    for name, size in given.items():
        if size is not None and (size < 0 or size % factor):
            raise UserError(
                f"--{name} {size}: give a multiple of {factor}, the VAE's pixels per latent pixel"
            )
    side = arguments.tile // factor
    overlap = side // 4 if arguments.overlap is None else arguments.overlap // factor
    return Tiles(height=side, width=side, overlap=overlap)


@contextlib.contextmanager
def on_all_devices(vae: "VideoVAE", height: int, width: int) -> Iterator["VideoVAE"]:
    """The VAE on this machine's devices, which share each frame within this context.

    Args:
      height, width: of the latents.
    """
    import jax

    from vidgen.parallel.mesh import frame_mesh
    from vidgen.parallel.rules import shardings

    devices = jax.local_devices()
    mesh = frame_mesh(len(devices), height, width).build(devices)
    with jax.set_mesh(mesh):
        yield jax.device_put(vae, shardings(vae, mesh))
