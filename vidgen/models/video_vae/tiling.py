"""Overlapping, blended tiles of frames, for a device without memory for full frames."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Array

__all__ = ["Tiles"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Size and overlap of tiles, in latent pixels. All tiles of a frame have the same size.

    Results differ from those of full frames: inner tile edges see zero padding, and attention within frames
    sees one tile. With the sprites' VAE, frames of 256 pixels and tiles of 16 latent pixels
    (`benchmarks/vae_tiles.py`), decoded pixels near the seams differ by 8.4 levels of 255 without overlap and
    by 0.5 if half of each tile overlaps; elsewhere by 0.3. Sharding frames over several devices
    (`vidgen.ops.convolution`) is exact.

    Attributes:
      height, width: size of a tile; a smaller frame is a single tile.
      overlap: smallest overlap of neighbouring tiles.
    """

    height: int = 32
    width: int = 32
    overlap: int = 8

    def __post_init__(self):
        if not 0 <= self.overlap < min(self.height, self.width):
            raise UserError(
                f"overlap={self.overlap} of tiles of {self.height} x {self.width}: "
                "give 0 or more, and less than both sides"
            )

    def split(self, x: Array, factor: int = 1) -> list[Array]:
        """Tiles of `b t h w c` frames in row-major order, all of the same shape.

        Args:
          factor: pixels of `x` per latent pixel, along height and width.
        """
        rows, columns, height, width = self._grid(x.shape[2] // factor, x.shape[3] // factor)
        return [
            x[:, :, i * factor : (i + height) * factor, j * factor : (j + width) * factor]
            for i in rows
            for j in columns
        ]

    def blend(self, tiles: Sequence[Array], height: int, width: int, factor: int = 1) -> Array:
        """Frames assembled from tiles in row-major order; overlaps are blended linearly.

        Args:
          height, width: size of the frame, in latent pixels.
          factor: pixels of the tiles per latent pixel, along height and width.
        """
        rows, columns, tile_height, tile_width = self._grid(height, width)
        row_weights = _weights(rows, tile_height, factor)
        column_weights = _weights(columns, tile_width, factor)
        b, t, th, tw, c = tiles[0].shape
        strips = []
        for index in range(len(rows)):
            strip = jnp.zeros((b, t, th, width * factor, c), tiles[0].dtype)
            for j, weight, tile in zip(
                columns, column_weights, tiles[index * len(columns) :][: len(columns)], strict=True
            ):
                strip = strip.at[:, :, :, j * factor : j * factor + tw].add(
                    tile * weight.reshape(1, 1, 1, -1, 1)
                )
            strips.append(strip)
        frame = jnp.zeros((b, t, height * factor, width * factor, c), tiles[0].dtype)
        for i, weight, strip in zip(rows, row_weights, strips, strict=True):
            frame = frame.at[:, :, i * factor : i * factor + th].add(strip * weight.reshape(1, 1, -1, 1, 1))
        return frame

    def _grid(self, height: int, width: int) -> tuple[list[int], list[int], int, int]:
        """Top rows and left columns of the tiles, and the tiles' height and width."""
        tile_height, tile_width = min(self.height, height), min(self.width, width)
        return (
            _starts(height, tile_height, self.overlap),
            _starts(width, tile_width, self.overlap),
            tile_height,
            tile_width,
        )


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Start positions of the fewest tiles that cover `length`, spaced evenly from edge to edge."""
    count = 1 if length <= size else math.ceil((length - overlap) / (size - overlap))
    return [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]


def _weights(starts: Sequence[int], size: int, factor: int) -> list[np.ndarray]:
    """Blending weight of each pixel of each tile along one axis; the weights of a frame pixel sum to 1."""
    size, starts = size * factor, [start * factor for start in starts]
    position = np.arange(size, dtype=np.float32)
    weights = []
    for index, start in enumerate(starts):
        before = starts[index - 1] + size - start if index else 0
        after = start + size - starts[index + 1] if index + 1 < len(starts) else 0
        rise = (position + 0.5) / before if before else np.ones(size)
        fall = (size - position - 0.5) / after if after else np.ones(size)
        weights.append(np.clip(np.minimum(rise, fall), 0, 1))
    total = np.zeros(starts[-1] + size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return [
        (weight / total[start : start + size]).astype(np.float32)
        for start, weight in zip(starts, weights, strict=True)
    ]
