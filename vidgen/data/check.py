"""Detection of damaged media files before a training run."""

import pathlib

from vidgen.data.image_reader import is_image, read_image
from vidgen.data.source import BrokenClip
from vidgen.data.video_file import VideoFile, VideoInfo

__all__ = ["find_damage"]

_NEAR_END = 1.0
"""The quick check seeks to this many seconds before the end."""

_FIRST_FRAMES = 3


def find_damage(path: pathlib.Path, info: VideoInfo, *, full: bool) -> str | None:
    """Reason why a file that `probe` accepted is damaged, or None if no damage is found.

    Args:
      path: a video or image file.
      info: result of `probe` for the file.
      full: decode and count all frames; otherwise decode the first frames and, after a seek, those near the
        end. Neither detects a flipped bit that decodes to a wrong picture; only a checksum would.
    """
    try:
        if is_image(path):
            read_image(path, size=None, crop_at=(0.5, 0.5))
            return None
        with VideoFile(path) as video:
            return _decode_all(video, info) if full else _decode_ends(video, info)
    except BrokenClip as error:
        return error.reason


def _decode_all(video: VideoFile, info: VideoInfo) -> str | None:
    count, end = 0, 0.0
    for frame in video.frames_from(0.0):
        count, end = count + 1, frame.end
    if info.num_frames is not None and count < info.num_frames:
        return f"only {count} of {info.num_frames} frames decode, up to {end:.2f} s"
    return _ends_early(end, info)


def _decode_ends(video: VideoFile, info: VideoInfo) -> str | None:
    for count, _ in enumerate(video.frames_from(0.0), start=1):
        if count == _FIRST_FRAMES:
            break
    end = 0.0
    for frame in video.frames_from(max(0.0, info.duration - _NEAR_END)):
        end = frame.end
    return _ends_early(end, info)


def _ends_early(end: float, info: VideoInfo) -> str | None:
    """Reason if frames end more than two frame durations early; less may be a matter of counting."""
    if info.duration - end > 2 / max(info.fps, 1.0):
        return f"truncated: its frames end at {end:.2f} s, expected {info.duration:.2f} s"
    return None
