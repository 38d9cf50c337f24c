"""Classification of the motion of one object from its positions, growth and angles."""

import numpy as np

from vidgen.core.typing import Float
from vidgen.data.sprites.attributes import Motion, Shape
from vidgen.evals.shape_matching import SYMMETRY, match_angles

__all__ = ["read_motion"]

GROWN = 1.55
"""Threshold for the growth ratio, between 1.3 (a camera zoom) and 1.85 (`grow` against a camera zoom)."""
MOVED = 0.15
"""Threshold for displacement, as a share of the frame. Straight motions cover at least 0.36; a camera zoom
moves a still object by up to 0.1."""
RETURNED = 0.6
"""Share of the path's length; if the ends are closer than this, the object bounces."""
ROUND = 0.25
"""Ratio of a path's spreads across and along; above it, the path is not straight."""
TURNED = 0.93
"""Mean resultant length of the angles; below it, the object spins."""
FRAMES_FOR_ANGLE = 9


def read_motion(
    *,
    shape: Shape,
    position: Float[np.ndarray, "t 2"],
    growth: float,
    alpha: Float[np.ndarray, "u h w"],
    centre: Float[np.ndarray, "u 2"],
) -> Motion:
    """Classifies a motion.

    Args:
        shape: shape of the object.
        position: (y, x) relative to the background, in units of the shorter side, in the frames where the
            object was detected.
        growth: ratio of the object's last radius to its first.
        alpha: coverage of the object, in frames that show all of it.
        centre: centroid of the object in these frames, in pixels.
    """
    if len(position) < 2:
        return Motion.STILL
    if growth > GROWN:
        return Motion.GROW
    if growth < 1 / GROWN:
        return Motion.SHRINK
    span, net = np.ptp(position, axis=0), position[-1] - position[0]
    if span.max() < MOVED:
        return Motion.SPIN if _spins(shape, alpha, centre) else Motion.STILL
    along, across = np.linalg.svd(position - position.mean(axis=0, keepdims=True), compute_uv=False)
    if across > ROUND * along:
        return Motion.ORBIT
    if span[0] >= span[1]:
        if abs(net[0]) < RETURNED * np.abs(np.diff(position[:, 0])).sum():
            return Motion.BOUNCE
        return Motion.DOWN if net[0] > 0 else Motion.UP
    return Motion.RIGHT if net[1] > 0 else Motion.LEFT


def _spins(shape: Shape, alpha: np.ndarray, centre: np.ndarray) -> bool:
    """Whether the matched angles are spread over the shape's symmetry."""
    if shape.is_round or len(alpha) < 3:
        return False
    frames = np.unique(np.linspace(0, len(alpha) - 1, FRAMES_FOR_ANGLE).round().astype(int))
    angles = match_angles(shape, alpha[frames], centre[frames])
    return bool(np.abs(np.exp(2j * np.pi * angles / SYMMETRY[shape]).mean()) < TURNED)
