"""Camera movement, measured on the texture of the background."""

import itertools

import numpy as np

from vidgen.core.typing import Float

__all__ = ["camera_offsets"]

SEGMENTS = 4
REACH = 0.12
"""Largest shift tested between two compared frames, as a share of the frame's width."""
SURE = 0.5
"""Correlation below which a shift is rejected."""


def camera_offsets(residual: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, " t"]:
    """Horizontal position of the camera in pixels, relative to the first frame.

    Frames a quarter of the clip apart are correlated at every shift, without the objects (where the residual
    is zero), and the shift of the best correlation is taken; between these frames, the position is
    interpolated linearly. A background without texture gives no information about the camera.
    """
    frames = residual.shape[0]
    keys = np.unique(np.linspace(0, frames - 1, SEGMENTS + 1).round().astype(int))
    shifts = [_shift(residual[a], residual[b]) for a, b in itertools.pairwise(keys)]
    offsets = np.concatenate([[0.0], np.cumsum(shifts)])
    return np.interp(np.arange(frames), keys, offsets)


def _shift(first: np.ndarray, second: np.ndarray) -> float:
    """Camera movement in pixels: content at x in the first frame is at x minus this in the second."""
    width = first.shape[1]
    reach = max(2, round(REACH * width))
    candidates = np.arange(-reach, reach + 1)
    scores = np.array([_correlation(first, second, int(k)) for k in candidates])
    best = int(scores.argmax())
    if scores[best] < SURE:
        return 0.0
    if 0 < best < len(scores) - 1:  # vertex of the parabola through the best three
        before, top, after = scores[best - 1 : best + 2]
        curvature = before - 2 * top + after
        return float(candidates[best] + (0.5 * (before - after) / curvature if curvature else 0.0))
    return float(candidates[best])


def _correlation(first: np.ndarray, second: np.ndarray, shift: int) -> float:
    width = first.shape[1]
    a = first[:, max(shift, 0) : width + min(shift, 0)]
    b = second[:, max(-shift, 0) : width + min(-shift, 0)]
    both = (a != 0) & (b != 0)
    if both.sum() < 0.1 * first.size:
        return 0.0
    a, b = a[both], b[both]
    norm = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / norm) if norm else 0.0
