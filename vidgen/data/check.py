"""Finding damage in media files before a training run does."""

import pathlib

from vidgen.data.image_reader import is_image, read_image
from vidgen.data.source import BrokenClip
from vidgen.data.video_file import VideoFile, VideoInfo

__all__ = ["find_damage"]

_NEAR_END = 1.0
"""Seconds before the end to which the quick check seeks."""

_FIRST_FRAMES = 3


def find_damage(path: pathlib.Path, info: VideoInfo, *, full: bool) -> str | None:
    """What is wrong with a file that `probe` could read, or None.

    Args:
      path: the file.
      info: as `probe` gave it.
      full: whether every frame is decoded and counted; otherwise the first ones, and those near the end
        after a seek. A flipped bit may still decode to a wrong picture: nothing short of a checksum finds
        that.
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
        return f"{count} of its {info.num_frames} frames decode, to {end:.2f} s"
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
    """A file whose last two frames are missing is cut off; one may be a matter of counting."""
    if info.duration - end > 2 / max(info.fps, 1.0):
        return f"cut off: its frames end at {end:.2f} s, it should last {info.duration:.2f} s"
    return None
