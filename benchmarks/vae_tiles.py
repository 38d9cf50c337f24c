"""Quality loss of tiled decoding by overlap: a video decoded in tiles against the same video without tiles.

    python benchmarks/vae_tiles.py

Uses the trained VAE in experiments/weights, on sprites with textured backgrounds. `seam` is the mean absolute
difference in 8-bit levels within 4 pixels of a tile's edge, `elsewhere` that of all other pixels. The last
line is one JSON object.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import pixels
from vidgen.data.sprites.source import SpritesData
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.tiling import Tiles
from vidgen.train.vae_folder import load_vae

ROOT = pathlib.Path(__file__).parents[1]
NEAR = 4
"""Largest distance in pixels from a seam that counts as near it."""


def main() -> None:
    """Prints a row per overlap and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=pathlib.Path, default=ROOT / "experiments" / "weights" / "sprites_vae")
    parser.add_argument("--side", type=int, default=256, help="height and width of a frame in pixels")
    parser.add_argument("--tile", type=int, default=16, help="height and width of a tile in latent pixels")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 2, 4, 8])
    arguments = parser.parse_args()
    vae = load_vae(arguments.vae)
    source = SpritesData(
        split="heldout", num_frames=5, height=arguments.side, width=arguments.side, backgrounds=("textured",)
    ).source()
    video = pixels.to_float(jnp.stack([source[index]["video"] for index in range(4)]))
    latents = jax.jit(streaming.encode)(vae, video)
    untiled = np.asarray(jax.jit(streaming.decode)(vae, latents))
    result = {}
    for overlap in arguments.overlaps:
        tiles = Tiles(height=arguments.tile, width=arguments.tile, overlap=overlap)
        decoded = jax.jit(lambda vae, z, tiles=tiles: streaming.decode(vae, z, tiles=tiles))(vae, latents)
        error = np.abs(np.asarray(decoded) - untiled)
        near = _near_seams(tiles, latents.shape[2:4], vae.config.spatial_factor)
        result[overlap] = {
            "tiles": len(tiles.split(latents)),
            "psnr": float(10 * np.log10(4 / np.mean(np.square(error)))),
            "seam": float(127.5 * error[:, :, near].mean()),
            "elsewhere": float(127.5 * error[:, :, ~near].mean()),
        }
        row = ", ".join(f"{name} {value:.3f}" for name, value in result[overlap].items())
        print(f"overlap {overlap:2d} of {arguments.tile}: {row}", flush=True)
    print(json.dumps({"tile": arguments.tile, "overlaps": result}))


def _near_seams(tiles: Tiles, size: tuple[int, ...], factor: int) -> np.ndarray:
    """Mask of the pixels of a frame within `NEAR` of a tile's edge that is not an edge of the frame."""
    height, width = size[0] * factor, size[1] * factor
    rows, columns = np.indices((height, width))
    frame = jnp.stack([rows, columns], axis=-1)[None, None]
    near = np.zeros((height, width), bool)
    for part in tiles.split(frame, factor):
        (top, left), (bottom, right) = part[0, 0, 0, 0].tolist(), (part[0, 0, -1, -1] + 1).tolist()
        for edge, position, end in ((top, rows, height), (bottom, rows, height), (left, columns, width)):
            near |= (0 < edge < end) & (abs(position - edge + 0.5) < NEAR)
        near |= (right < width) & (abs(columns - right + 0.5) < NEAR)
    return near


if __name__ == "__main__":
    main()
