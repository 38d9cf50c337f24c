"""An open video file: what it holds, and its frames from any time on."""

import dataclasses
import io
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from vidgen.data.geometry import UPRIGHT, Orientation
from vidgen.data.source import BrokenClip

__all__ = ["TIME_ROUNDING", "TimedFrame", "VideoFile", "VideoInfo", "orientation"]

TIME_ROUNDING = 1e-4
"""Seconds by which a presentation time may be off through rounding in its container."""

_SEEK_BACK = (0.0, 1.0, 5.0)
"""Seconds before the wanted start that are sought, in turn, until a frame at or before it comes out."""

_FLOATS = "f32"
"""In the names of FFmpeg's pixel formats of floating point numbers."""

_ERRORS = (FFmpegError, OSError, ValueError)
"""What PyAV raises on damaged files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file holds, as a person sees it.

    Attributes:
      width: pixels, after rotation.
      height: pixels, after rotation.
      fps: frames per second on average; 0 for an image.
      num_frames: as the container says, or None where it does not say.
      duration: seconds, from the first frame to the end of the last; 0 for an image.
      rotation: degrees by which the stored frames are turned clockwise to be shown: 0, 90, 180 or 270.
      pixel_aspect: width of a shown pixel over its height; 1 for nearly all files.
      codec: its name, as FFmpeg (or, for images, Pillow) gives it.
      pix_fmt: pixel format, as FFmpeg (or, for images, Pillow) names it.
      has_audio: whether there is a sound track.
      is_image: whether this is a single picture.
    """

    width: int
    height: int
    fps: float
    num_frames: int | None
    duration: float
    rotation: int
    pixel_aspect: float
    codec: str
    pix_fmt: str
    has_audio: bool
    is_image: bool


class TimedFrame(NamedTuple):
    """A decoded frame, with the seconds after the file's first frame at which it appears and vanishes."""

    time: float
    end: float
    frame: av.VideoFrame


class VideoFile:
    """A video file, read forward from any time; not for use by several threads at once.

    Raises `BrokenClip`, here and in every method, where the file is damaged or has no picture.
    """

    def __init__(self, file: pathlib.Path | io.BytesIO):
        self.name = str(file) if isinstance(file, pathlib.Path) else getattr(file, "name", "video in memory")
        try:
            self._container = av.open(
                str(file) if isinstance(file, pathlib.Path) else file,
                "r",
                metadata_errors="replace",
                container_options={"protocol_whitelist": "file"},
            )
        except _ERRORS as error:
            raise BrokenClip(self.name, f"cannot be opened as video: {_reason(error)}") from error
        try:
            self._stream = self._pick_stream()
            self._stream.codec_context.thread_count = 1
            self._tick = self._stream.time_base or Fraction(1, av.time_base)
            self._started = False
            self._origin = self._find_origin()
        except BrokenClip:
            self._container.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def info(self) -> VideoInfo:
        """What the file holds; decodes one frame."""
        frame = next(self._decode(None), None)
        if frame is None:
            raise BrokenClip(self.name, "the video stream has no frames")
        duration, count = self._length()
        turn = orientation(frame)
        sides = (frame.width, frame.height)
        rate = self._stream.average_rate or self._stream.guessed_rate
        return VideoInfo(
            width=sides[turn.swaps_sides],
            height=sides[not turn.swaps_sides],
            fps=float(rate) if rate else (count or 1) / max(duration, 1e-9),
            num_frames=count,
            duration=duration,
            rotation=90 * turn.quarter_turns,
            pixel_aspect=self.pixel_aspect(turn),
            codec=self._stream.codec_context.name,
            pix_fmt=frame.format.name,
            has_audio=bool(self._container.streams.audio),
            is_image=False,
        )

    def frames_from(self, start: float) -> Iterator[TimedFrame]:
        """Frames in the order of presentation, from some frame at or before `start` (seconds) on."""
        for back in _SEEK_BACK:
            if start - back <= 0:
                break
            frames = self._timed(self._decode(start - back))
            first = next(frames, None)
            if first is not None and first.time <= start + TIME_ROUNDING:
                yield first
                yield from frames
                return
        yield from self._timed(self._decode(None))

    def pixel_aspect(self, turn: Orientation) -> float:
        """Width over height of a pixel, as shown."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        return 1 / aspect if turn.swaps_sides else aspect

    def _pick_stream(self) -> VideoStream:
        """The first video stream that is not a cover picture."""
        if self._container.format.name == "tty":
            raise BrokenClip(self.name, "a text file, not a video")
        for stream in self._container.streams.video:
            if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None:
                return stream
        raise BrokenClip(self.name, "no video stream")

    def _find_origin(self) -> float:
        """Seconds on the container's clock at which the first frame is shown."""
        if (
            self._container.format.name == "avi"
        ):  # has no presentation times; those that are made up start late
            first = next(self._decode(None), None)
            return float((first.pts or 0) * self._tick) if first else 0.0
        return float((self._stream.start_time or 0) * self._tick)

    def _timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[TimedFrame]:
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        end = 0.0
        for frame in frames:
            base = frame.time_base or self._tick
            time = end if frame.pts is None else float(frame.pts * base) - self._origin
            end = time + float(frame.duration * base if frame.duration else 1 / rate)
            yield TimedFrame(time, end, frame)

    def _decode(self, start: float | None) -> Iterator[av.VideoFrame]:
        """Frames in the order of presentation, from the key frame before `start`, or from the first one."""
        try:
            if start is not None:
                self._seek(start)
            elif self._started:
                self._seek(0.0)
            self._started = True
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    raise BrokenClip(self.name, f"damaged at {frame.time or 0.0:.3f} s")
                if _FLOATS in frame.format.name and not np.isfinite(frame.to_ndarray()).all():
                    raise BrokenClip(self.name, f"pixels are not finite at {frame.time or 0.0:.3f} s")
                yield frame
        except _ERRORS as error:
            raise BrokenClip(self.name, f"cannot be decoded: {_reason(error)}") from error

    def _seek(self, start: float) -> None:
        self._container.seek(round((start + self._origin) / self._tick), stream=self._stream, backward=True)

    def _length(self) -> tuple[float, int | None]:
        """Seconds from the first frame to the end of the last, and the number of frames if known."""
        count = self._stream.frames or None
        if self._stream.duration:
            return float(self._stream.duration * self._tick), count
        tagged = _seconds(self._stream.metadata.get("DURATION", ""))
        if tagged:
            return tagged - self._origin, count
        return self._measure()

    def _measure(self) -> tuple[float, int]:
        """As `_length`, from the packets: for containers that do not say."""
        try:
            self._seek(0.0)
            ends = [
                (packet.pts + (packet.duration or 0)) * self._tick
                for packet in self._container.demux(self._stream)
                if packet.pts is not None
            ]
        except _ERRORS as error:
            raise BrokenClip(self.name, f"cannot be read to its end: {_reason(error)}") from error
        return float(max(ends, default=0)) - self._origin, len(ends)


def orientation(frame: av.VideoFrame) -> Orientation:
    """How a frame is turned to be shown, from its display matrix."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else Orientation.from_matrix(np.frombuffer(bytes(matrix), np.int32))


def _seconds(clock: str) -> float:
    """Of a duration such as "00:01:02.5"; 0 where there is none."""
    try:
        hours, minutes, seconds = clock.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
