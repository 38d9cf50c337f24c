"""How a stored frame becomes the picture that is wanted: turned, resized without distortion, cropped."""

import dataclasses
import math

import numpy as np

from vidgen.core.typing import UInt8

__all__ = ["UPRIGHT", "Crop", "Orientation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orientation:
    """How the stored picture is turned to be shown.

    Attributes:
      mirror: whether left and right are swapped, before turning.
      quarter_turns: by 90 degrees clockwise, 0 to 3.
    """

    mirror: bool = False
    quarter_turns: int = 0

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> "Orientation":
        """Of the nine numbers of a display matrix (ISO/IEC 14496-12, 8.3.2), rounded to 90 degrees."""
        a, b, c, d = (float(matrix[index]) for index in (0, 1, 3, 4))
        mirror = a * d - b * c < 0
        if mirror:
            a, b = -a, -b
        return cls(mirror=mirror, quarter_turns=round(math.degrees(math.atan2(b, a)) / 90) % 4)

    @property
    def swaps_sides(self) -> bool:
        """Whether the shown picture is as wide as the stored one is high."""
        return self.quarter_turns % 2 == 1

    def apply(self, pixels: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "_h2 _w2 3"]:
        """The picture as it is shown."""
        if self.mirror:
            pixels = pixels[:, ::-1]
        return np.rot90(pixels, -self.quarter_turns) if self.quarter_turns else pixels


UPRIGHT = Orientation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """A picture resized until it just covers the wanted size, and the part of it that is kept.

    Attributes:
      resized: height and width after resizing, as shown.
      top: first row that is kept.
      left: first column that is kept.
      size: height and width that are kept.
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
        """The crop of a picture to a size.

        Args:
          shown: height and width of the picture, in its own pixels.
          size: height and width that are wanted; None keeps the picture as it is.
          pixel_aspect: width of its pixels over their height.
          crop_at: where the crop lies between top and bottom and between left and right, each in [0, 1].
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
        """The part that is kept of a picture that has been resized."""
        return pixels[self.top : self.top + self.size[0], self.left : self.left + self.size[1]]
