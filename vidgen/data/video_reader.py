"""RGB frames from video and image files: frame-accurate, resampled in time, resized and cropped."""

import contextlib
import io
import itertools
import os
import pathlib
from collections.abc import Generator, Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from vidgen.core.errors import UserError
from vidgen.core.typing import RGBClip
from vidgen.data import image_reader
from vidgen.data.decoding import broken_clips
from vidgen.data.geometry import Crop
from vidgen.data.source import BrokenClip
from vidgen.data.video_file import TIME_ROUNDING, TimedFrame, VideoFile, VideoInfo, orientation

__all__ = ["probe", "read_clip", "read_frames"]

_UNSPECIFIED = 2
"""Code of an unspecified colour matrix in ITU-T H.273."""

_HD_LINES = 577
"""Untagged video of at least this height is decoded as BT.709, lower video as BT.601, as players do."""

_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Metadata of a video or image file; decodes one frame of a video.

    Raises:
      BrokenClip: the file cannot be read, or has no picture.
    """
    path = pathlib.Path(path)
    if image_reader.is_image(path):
        width, height, codec, mode = image_reader.probe_image(path)
        return VideoInfo(
            width=width,
            height=height,
            fps=0.0,
            num_frames=1,
            duration=0.0,
            rotation=0,
            pixel_aspect=1.0,
            codec=codec,
            pix_fmt=mode,
            has_audio=False,
            is_image=True,
        )
    with VideoFile(path) as video:
        return video.info()


def read_clip(
    file: str | os.PathLike[str] | io.BytesIO,
    *,
    start: float | int = 0.0,
    num_frames: int | None = None,
    fps: float | int | None = None,
    height: int | None = None,
    width: int | None = None,
    crop_at: tuple[float, float] = (0.5, 0.5),
) -> RGBClip:
    """Decodes a clip at a given frame rate and size.

    Frame `i` of the clip is the file's frame whose presentation time is nearest to `start + i / fps`; on a
    tie, the earlier one. Each frame is rotated by the file's display matrix, resized at constant aspect ratio
    (anti-aliased bicubic) until it covers `height` x `width`, and cropped. Transparency is composited over
    white. High dynamic range is not tone-mapped. An image is a clip of one frame.

    Args:
      file: path of a video or image, or a video in memory.
      start: seconds after the file's first frame.
      num_frames: frames of the clip; None reads to the end of the file.
      fps: frames per second; None returns the file's frames without resampling.
      height: pixels of the result; None keeps the file's size (give both sides or neither).
      width: as `height`.
      crop_at: position of the crop between top and bottom and between left and right, each in [0, 1].

    Returns:
      uint8 [num_frames height width 3].

    Raises:
      BrokenClip: the file is damaged, has no picture, or ends before the clip does.
      UserError: an argument is out of range, or only one of `height` and `width` is given.
    """
    if num_frames is not None and num_frames < 1:
        raise UserError(f"num_frames is {num_frames}: expected 1 or more.")
    name = str(file) if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "video in memory")
    is_path = isinstance(file, (str, os.PathLike))
    if num_frames not in (None, 1) and is_path and image_reader.is_image(pathlib.Path(file)):
        raise BrokenClip(name, f"an image is one frame, {num_frames} are wanted")
    frames = read_frames(file, start=start, fps=fps, height=height, width=width, crop_at=crop_at)
    with contextlib.closing(frames):
        clip = list(itertools.islice(frames, num_frames))
    if len(clip) < (num_frames or 1):
        rate = f" at {fps:g} fps" if fps else ""
        raise BrokenClip(name, f"only {len(clip)} of {num_frames or 1} frames{rate} follow {start:.3f} s")
    return np.stack(clip)


def read_frames(
    file: str | os.PathLike[str] | io.BytesIO,
    *,
    start: float | int = 0.0,
    fps: float | int | None = None,
    height: int | None = None,
    width: int | None = None,
    crop_at: tuple[float, float] = (0.5, 0.5),
) -> Generator[np.ndarray]:
    """Yields the frames of `read_clip` up to the end of the file, each uint8 [height width 3].

    Raises:
      BrokenClip: the file is damaged or has no picture.
      UserError: an argument is out of range, or only one of `height` and `width` is given.
    """
    if (height is None) != (width is None):
        raise UserError(f"height is {height} and width is {width}: give both or neither.")
    if start < 0 or (fps is not None and fps <= 0):
        raise UserError(f"start is {start}, fps {fps}: expected start >= 0 and fps > 0.")
    size = None if height is None or width is None else (height, width)
    return _frames(file, float(start), fps, size, crop_at)


def _frames(
    file: str | os.PathLike[str] | io.BytesIO,
    start: float,
    fps: float | int | None,
    size: tuple[int, int] | None,
    crop_at: tuple[float, float],
) -> Generator[np.ndarray]:
    if isinstance(file, (str, os.PathLike)):
        file = pathlib.Path(file)
        if image_reader.is_image(file):
            yield image_reader.read_image(file, size=size, crop_at=crop_at)
            return
    with VideoFile(file) as video:
        frames = video.frames_from(start)
        chosen = _one_by_one(frames, start) if fps is None else _nearest(frames, start, fps)
        with broken_clips(video.name, "cannot be converted to pixels"):
            yield from _to_rgb_frames(video, chosen, size, crop_at)


def _to_rgb_frames(
    video: VideoFile,
    frames: Iterable[av.VideoFrame],
    size: tuple[int, int] | None,
    crop_at: tuple[float, float],
) -> Iterator[np.ndarray]:
    """Converts frames to RGB pictures; consecutive repeats of a frame are converted once."""
    reformatter = VideoReformatter()
    last: av.VideoFrame | None = None
    for frame in frames:
        if frame is not last:
            turn = orientation(frame)
            shown = (frame.width, frame.height) if turn.swaps_sides else (frame.height, frame.width)
            crop = Crop.covering(shown, size, pixel_aspect=video.pixel_aspect(turn), crop_at=crop_at)
            stored = crop.resized[::-1] if turn.swaps_sides else crop.resized
            picture = crop.apply(turn.apply(_to_rgb(reformatter, frame, *stored)))
        yield picture
        last = frame


def _to_rgb(reformatter: VideoReformatter, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Frame as uint8 [height width 3]."""
    if any(component.is_alpha for component in frame.format.components):
        frame = _on_white(frame)
    untagged_hd = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_LINES
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if untagged_hd else None,
        interpolation=_SCALER,
        threads=1,
    )
    return rgb.to_ndarray()


def _one_by_one(frames: Iterator[TimedFrame], start: float | int) -> Iterator[av.VideoFrame]:
    """Frames in presentation order, starting with the frame on screen at `start`."""
    for _, end, frame in frames:
        if end > start + TIME_ROUNDING:
            yield frame


def _nearest(frames: Iterator[TimedFrame], start: float | int, fps: float | int) -> Iterator[av.VideoFrame]:
    """Frame nearest to each target time `start + i / fps` before the end of the last frame."""
    previous = next(frames, None)
    if previous is None:
        return
    index = 0
    for current in frames:
        middle = (previous.time + current.time) / 2
        while start + index / fps <= middle + TIME_ROUNDING:
            yield previous.frame
            index += 1
        previous = current
    while start + index / fps < previous.end - TIME_ROUNDING:
        yield previous.frame
        index += 1


def _on_white(frame: av.VideoFrame) -> av.VideoFrame:
    pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
    alpha = pixels[..., 3:]
    opaque = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(opaque.astype(np.uint8), format="rgb24")
