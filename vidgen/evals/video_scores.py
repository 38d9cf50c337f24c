"""Scores of videos one by one and in all, as values and as a table."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["VideoScores", "format_scores", "overall"]

_COLUMNS = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "flicker": ("flicker", ".3f"),
    "lpips": ("LPIPS", ".4f"),
}
"""Heading and format of each score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoScores:
    """How one video comes back.

    Attributes:
      name: which one.
      num_frames: of it.
      psnr: decibels, mean over frames.
      ssim: mean over frames.
      flicker: 8-bit levels, mean over pairs of frames; None of an image.
      lpips: mean over frames; None without its network.
    """

    name: str
    num_frames: int
    psnr: float
    ssim: float
    flicker: float | None = None
    lpips: float | None = None


def overall(scores: Sequence[VideoScores]) -> dict[str, float]:
    """Means over all frames of all videos, of flicker over all pairs of frames; what none has is left out.

    Returns:
      Scores by name; `num_clips`, the videos, and `num_frames`.
    """
    result: dict[str, float] = {}
    for name in ("psnr", "ssim", "flicker", "lpips"):
        parts = [
            (value, score.num_frames - (name == "flicker"))
            for score in scores
            if (value := getattr(score, name)) is not None
        ]
        if parts:
            values, weights = zip(*parts, strict=True)
            result[name] = float(np.average(values, weights=weights))
    return result | {"num_clips": len(scores), "num_frames": sum(score.num_frames for score in scores)}


def format_scores(scores: Sequence[VideoScores], total: Mapping[str, float]) -> str:
    """A table with a line for each video and one for all, as `overall` gives it."""
    columns = [name for name in _COLUMNS if name in total]
    heads = ["", "frames", *(_COLUMNS[name][0] for name in columns)]
    rows = [[s.name, str(s.num_frames), *(_cell(name, getattr(s, name)) for name in columns)] for s in scores]
    rows.append(["all", f"{total['num_frames']:.0f}", *(_cell(name, total[name]) for name in columns)])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [heads, *rows]
    ]
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, _COLUMNS[name][1])
