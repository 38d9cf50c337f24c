"""Outlines of the shapes, as signed distances and as points, for a unit object centred at the origin.

Coordinates are (y, x) with y pointing down. The unit shapes are scaled to look equally big.
"""

import functools
import math

import numpy as np

from vidgen.core.typing import Float
from vidgen.data.sprites.attributes import Shape

__all__ = ["outline", "reach", "signed_distance"]

SQUARE_SIDE = 0.88
TRIANGLE_RADIUS = 1.25
DIAMOND_HEIGHT, DIAMOND_WIDTH = 1.25, 0.7
STAR_OUTER, STAR_INNER = 1.25, 0.54
CROSS_LENGTH, CROSS_WIDTH = 1.12, 0.36
RING_OUTER, RING_INNER = 1.08, 0.56
CRESCENT_OUTER, CRESCENT_INNER, CRESCENT_SHIFT = 1.15, 0.95, 0.65
CRESCENT_CENTROID = -0.444
"""Centroid of the crescent relative to the centre of its outer circle; it rotates around the centroid."""


def signed_distance(shape: Shape, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside.

    Exact along edges; at outer corners a lower bound, which keeps corners sharp and suffices for
    anti-aliasing.

    Args:
        shape: shape of the outline.
        y: coordinates, an array of any shape, in units of the object.
        x: as `y`.
    """
    match shape:
        case Shape.CIRCLE:
            return np.hypot(y, x) - 1
        case Shape.SQUARE:
            return np.maximum(np.abs(y), np.abs(x)) - SQUARE_SIDE
        case Shape.TRIANGLE:
            slanted = math.sqrt(0.75) * np.abs(x) - 0.5 * y
            return np.maximum(slanted, y) - TRIANGLE_RADIUS / 2
        case Shape.DIAMOND:
            norm = math.hypot(DIAMOND_HEIGHT, DIAMOND_WIDTH)
            return (
                np.abs(y) * DIAMOND_WIDTH + np.abs(x) * DIAMOND_HEIGHT - DIAMOND_HEIGHT * DIAMOND_WIDTH
            ) / norm
        case Shape.STAR:
            return _star(y, x)
        case Shape.CROSS:
            long, short = np.maximum(np.abs(y), np.abs(x)), np.minimum(np.abs(y), np.abs(x))
            return np.maximum(long - CROSS_LENGTH, short - CROSS_WIDTH)
        case Shape.RING:
            middle, half = (RING_OUTER + RING_INNER) / 2, (RING_OUTER - RING_INNER) / 2
            return np.abs(np.hypot(y, x) - middle) - half
        case Shape.CRESCENT:
            x = x + CRESCENT_CENTROID
            return np.maximum(
                np.hypot(y, x) - CRESCENT_OUTER, CRESCENT_INNER - np.hypot(y, x - CRESCENT_SHIFT)
            )


@functools.cache
def reach(shape: Shape) -> float:
    """Radius of the smallest circle around the origin that contains the unit shape."""
    return float(np.hypot(*outline(shape).T).max())


def outline(shape: Shape) -> Float[np.ndarray, "p 2"]:
    """Points (y, x) on the outer outline that span its extent at every angle: corners, or a dense arc."""
    match shape:
        case Shape.CIRCLE:
            return _polygon(1.0, 64)
        case Shape.SQUARE:
            return _polygon(SQUARE_SIDE * math.sqrt(2), 4, turn=math.pi / 4)
        case Shape.TRIANGLE:
            return _polygon(TRIANGLE_RADIUS, 3)
        case Shape.DIAMOND:
            return _polygon(1.0, 4) * [DIAMOND_HEIGHT, DIAMOND_WIDTH]
        case Shape.STAR:
            return _polygon(STAR_OUTER, 5)
        case Shape.CROSS:
            a, b = CROSS_LENGTH, CROSS_WIDTH
            return np.array([[u * p, v * q] for u in (-1, 1) for v in (-1, 1) for p, q in ((a, b), (b, a))])
        case Shape.RING:
            return _polygon(RING_OUTER, 64)
        case Shape.CRESCENT:
            arc = _polygon(CRESCENT_OUTER, 256)
            is_outer = np.hypot(arc[:, 0], arc[:, 1] - CRESCENT_SHIFT) >= CRESCENT_INNER
            return arc[is_outer] - [0, CRESCENT_CENTROID]


def _polygon(radius: float, corners: int, turn: float = 0.0) -> np.ndarray:
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([-np.cos(angles), np.sin(angles)], axis=-1)


def _star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance to a star with five points, one upwards.

    The plane is folded into a tenth of the circle, where the outline is one straight edge.
    """
    sector = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(y, x)
    along, across = STAR_INNER * math.cos(math.pi / 5) - STAR_OUTER, STAR_INNER * math.sin(math.pi / 5)
    length = math.hypot(along, across)
    return (across / length) * (radius * np.cos(angle) - STAR_OUTER) - (along / length) * radius * np.sin(
        angle
    )
