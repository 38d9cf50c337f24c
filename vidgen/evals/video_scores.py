"""Reconstruction scores of videos, one by one and overall, as values and as a table."""

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
    """Reconstruction scores of one video.

    Attributes:
      name: name of the video.
      num_frames: number of frames.
      psnr: decibels, mean over frames.
      ssim: mean over frames.
      flicker: 8-bit levels, mean over pairs of consecutive frames; None for an image.
      lpips: mean over frames; None without the LPIPS network.
    """

    name: str
    num_frames: int
    psnr: float
    ssim: float
    flicker: float | None = None
    lpips: float | None = None


def overall(scores: Sequence[VideoScores]) -> dict[str, float]:
    """Means over the frames (`flicker`: frame pairs) of all videos; scores that no video has are left out.

    Returns:
      Scores by name, with `num_clips`, the number of videos, and `num_frames`.
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
    """Table with a line for each video and one for the result of `overall`."""
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
