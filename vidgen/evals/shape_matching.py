"""Shape recognition: renders every shape at several angles and compares it with an object's coverage."""

import dataclasses
import functools

import numpy as np

from vidgen.core.typing import Float
from vidgen.data.sprites.attributes import Shape
from vidgen.data.sprites.motion import Path
from vidgen.data.sprites.render import coverage

__all__ = ["SYMMETRY", "ShapeMatch", "match_angles", "match_quality", "match_shape", "unit_area"]

SYMMETRY = {
    Shape.CIRCLE: 0.0,
    Shape.SQUARE: np.pi / 2,
    Shape.TRIANGLE: 2 * np.pi / 3,
    Shape.DIAMOND: np.pi,
    Shape.STAR: 2 * np.pi / 5,
    Shape.CROSS: np.pi / 2,
    Shape.RING: 0.0,
    Shape.CRESCENT: 2 * np.pi,
}
"""Smallest rotation, in radians, that maps a shape to itself; zero if every rotation does."""
COARSE, FINE = np.radians(15.0), np.radians(6.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeMatch:
    """The best shape, and the score of each shape: intersection over union in [0, 1]."""

    shape: Shape
    scores: dict[Shape, float]


@functools.cache
def unit_area(shape: Shape) -> float:
    """Area of a shape of radius one."""
    path = Path(position=np.zeros((1, 2)), radius=np.array([100.0]), angle=np.zeros(1))
    return float(coverage(shape, path, 1)[0].sum()) / 100.0**2


def match_shape(alpha: Float[np.ndarray, "t h w"], centre: Float[np.ndarray, "t 2"]) -> ShapeMatch:
    """Finds the shape with the best overlap with the coverage of one object, at the best angle in each frame.

    Args:
        alpha: coverage of the object, in frames that show all of it.
        centre: centroid of the object (y, x) in pixels, per frame.
    """
    scores = {shape: float(_overlaps(shape, alpha, centre, COARSE).max(axis=1).mean()) for shape in Shape}
    return ShapeMatch(shape=max(scores, key=lambda s: scores[s]), scores=scores)


def match_quality(
    shape: Shape, alpha: Float[np.ndarray, "t h w"], centre: Float[np.ndarray, "t 2"]
) -> Float[np.ndarray, " t"]:
    """Overlap of a known shape in each frame, in [0, 1]; lower where part of the object is hidden."""
    return _overlaps(shape, alpha, centre, COARSE).max(axis=1)


def match_angles(
    shape: Shape, alpha: Float[np.ndarray, "t h w"], centre: Float[np.ndarray, "t 2"]
) -> Float[np.ndarray, " t"]:
    """Angle of a known shape in each frame, in radians modulo its symmetry."""
    overlaps = _overlaps(shape, alpha, centre, FINE)
    return overlaps.argmax(axis=1) * SYMMETRY[shape] / overlaps.shape[1]


def _overlaps(shape: Shape, alpha: np.ndarray, centre: np.ndarray, step: float) -> np.ndarray:
    """Intersection over union with the rendered shape of equal area, [t, angles]."""
    count = max(1, round(SYMMETRY[shape] / step))
    frames = len(alpha)
    area = alpha.sum(axis=(1, 2))
    radius = np.sqrt(area / unit_area(shape))
    path = Path(
        position=np.repeat(centre + 0.5, count, axis=0),
        radius=np.repeat(radius, count),
        angle=np.tile(np.arange(count) * SYMMETRY[shape] / count, frames),
    )
    drawn, corner = coverage(shape, path, 1)
    size = drawn.shape[1]
    drawn, corner = drawn.reshape(frames, count, size, size), corner.reshape(frames, count, 2)[:, 0]
    margin = max(0, -int(corner.min()), int((corner + size - np.asarray([alpha.shape[1:]])).max()))
    padded = np.pad(alpha, ((0, 0), (margin, margin), (margin, margin)))
    windows = np.stack(
        [padded[k, y + margin :, x + margin :][:size, :size] for k, (y, x) in enumerate(corner.tolist())]
    )
    common = np.minimum(drawn, windows[:, None]).sum(axis=(2, 3))
    return common / (drawn.sum(axis=(2, 3)) + area[:, None] - common)
