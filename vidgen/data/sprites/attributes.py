"""Attributes of the sprite world: shapes, colours, sizes, motions, backgrounds and cameras.

Lengths are in units of the shorter side of the frame, colours are 8-bit RGB.
"""

import enum
import functools
from collections.abc import Mapping
from types import MappingProxyType

from vidgen.core.errors import UserError

__all__ = [
    "BACKGROUND_COLOURS",
    "COLOURS",
    "DIAMETERS",
    "RGB",
    "Backdrop",
    "Camera",
    "Motion",
    "Shape",
    "Size",
    "colour_shape_pairs",
    "is_held_out",
]

RGB = tuple[int, int, int]


class Shape(enum.StrEnum):
    """Outline of an object; no two are equal under rotation."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    DIAMOND = "diamond"
    STAR = "star"
    CROSS = "cross"
    RING = "ring"
    CRESCENT = "crescent"

    @property
    def is_round(self) -> bool:
        """Whether rotation leaves the shape unchanged, so that a spin is invisible."""
        return self in (Shape.CIRCLE, Shape.RING)


class Size(enum.StrEnum):
    """Named sizes; `DIAMETERS` has the numbers."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Motion(enum.StrEnum):
    """Motion of one object during the clip, relative to the background."""

    LEFT = "left"
    RIGHT = "right"
    UP = "up"
    DOWN = "down"
    BOUNCE = "bounce"
    ORBIT = "orbit"
    GROW = "grow"
    SHRINK = "shrink"
    SPIN = "spin"
    STILL = "still"


class Backdrop(enum.StrEnum):
    """Kind of background. A gradient runs from the top of the frame to its bottom."""

    PLAIN = "plain"
    GRADIENT = "gradient"
    TEXTURED = "textured"


class Camera(enum.StrEnum):
    """Motion of the camera, which only a textured background shows; on others the camera is static."""

    STATIC = "static"
    PAN_LEFT = "pan_left"
    PAN_RIGHT = "pan_right"
    ZOOM_IN = "zoom_in"
    ZOOM_OUT = "zoom_out"


COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "red": (222, 30, 38),
        "green": (30, 170, 60),
        "blue": (40, 80, 240),
        "yellow": (250, 225, 30),
        "cyan": (30, 215, 225),
        "pink": (250, 110, 200),
        "orange": (250, 135, 20),
        "purple": (140, 40, 190),
    }
)
"""Object colours: saturated."""

BACKGROUND_COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "black": (22, 22, 24),
        "gray": (128, 128, 128),
        "white": (236, 236, 236),
        "beige": (214, 196, 160),
        "brown": (104, 70, 44),
        "navy": (26, 40, 100),
    }
)
"""Background colours: far less saturated than any object colour."""

DIAMETERS: Mapping[Size, float] = MappingProxyType({Size.SMALL: 0.18, Size.MEDIUM: 0.27, Size.LARGE: 0.39})
"""Diameter of the circle; the other shapes are scaled to look as big. For `grow` and `shrink`, the
diameter at half time."""


def is_held_out(colour: str, shape: Shape) -> bool:
    """Whether a pair of colour and shape is excluded from the training split.

    The rule is a Latin square on the indices, `(colour + 3 shape) mod 8 == 0`: one eighth of the pairs, with
    each colour and each shape held out exactly once and seen in training with the seven others.
    """
    row, column = list(COLOURS).index(colour), list(Shape).index(shape)
    return (row + 3 * column) % len(COLOURS) == 0


@functools.cache
def colour_shape_pairs(split: str) -> tuple[tuple[str, Shape], ...]:
    """Pairs of colour and shape from which a split draws its objects.

    `train` has 56 of the 64 pairs, `heldout` the other 8, `all` has all 64.

    Raises:
        UserError: the split does not exist.
    """
    wanted = {"train": (False,), "heldout": (True,), "all": (False, True)}
    if split not in wanted:
        raise UserError(f"split is {split!r}; expected one of {', '.join(wanted)}")
    return tuple((c, s) for c in COLOURS for s in Shape if is_held_out(c, s) in wanted[split])
