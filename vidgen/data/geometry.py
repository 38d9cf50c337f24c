"""Geometry from stored frame to output picture: rotation, resize without distortion, crop."""

import dataclasses
import math

import numpy as np

from vidgen.core.typing import UInt8

__all__ = ["UPRIGHT", "Crop", "Orientation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orientation:
    """Rotation and mirroring from the stored picture to the displayed one.

    Attributes:
      mirror: whether left and right are swapped, before the rotation.
      quarter_turns: clockwise rotation in units of 90 degrees, 0 to 3.
    """

    mirror: bool = False
    quarter_turns: int = 0

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> "Orientation":
        """Parses the nine numbers of a display matrix (ISO/IEC 14496-12, 8.3.2), rounded to 90 degrees."""
        a, b, c, d = (float(matrix[index]) for index in (0, 1, 3, 4))
        mirror = a * d - b * c < 0
        if mirror:
            a, b = -a, -b
        return cls(mirror=mirror, quarter_turns=round(math.degrees(math.atan2(b, a)) / 90) % 4)

    @property
    def swaps_sides(self) -> bool:
        """Whether the rotation swaps height and width."""
        return self.quarter_turns % 2 == 1

    def apply(self, pixels: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "_h2 _w2 3"]:
        """Displayed picture of a stored one."""
        if self.mirror:
            pixels = pixels[:, ::-1]
        return np.rot90(pixels, -self.quarter_turns) if self.quarter_turns else pixels


UPRIGHT = Orientation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """A resize that just covers the target size, and the crop to that size.

    Attributes:
      resized: height and width after resizing, of the displayed picture.
      top: first image row of the crop.
      left: first image column of the crop.
      size: height and width of the crop.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]

    @classmethod
    def covering(
        cls,
        shown: tuple[int, int],
        size: tuple[int, int] | None,
        *,
        pixel_aspect: float = 1.0,
        crop_at: tuple[float, float] = (0.5, 0.5),
    ) -> "Crop":
        """Resize and crop of a picture to a target size.

        Args:
          shown: height and width of the displayed picture, in its pixels.
          size: target height and width; None leaves the picture unchanged.
          pixel_aspect: pixel width over pixel height.
          crop_at: position of the crop between top and bottom and between left and right, each in [0, 1].
        """
        if size is None:
            return cls(resized=shown, top=0, left=0, size=shown)
        scale = max(size[0] / shown[0], size[1] / (shown[1] * pixel_aspect))
        height = max(size[0], round(shown[0] * scale))
        width = max(size[1], round(shown[1] * pixel_aspect * scale))
        top = round((height - size[0]) * crop_at[0])
        left = round((width - size[1]) * crop_at[1])
        return cls(resized=(height, width), top=top, left=left, size=size)

    def apply(self, pixels: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "_h2 _w2 3"]:
        """Crops a picture of size `resized`."""
        return pixels[self.top : self.top + self.size[0], self.left : self.left + self.size[1]]
