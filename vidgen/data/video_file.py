"""An open video file: metadata, and frames from any start time."""

import dataclasses
import io
import math
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.stream import VideoStream

from vidgen.data.decoding import RAW_FORMATS, broken_clips, open_container
from vidgen.data.geometry import UPRIGHT, Orientation
from vidgen.data.source import BrokenClip

__all__ = ["TIME_ROUNDING", "TimedFrame", "VideoFile", "VideoInfo", "orientation"]

TIME_ROUNDING = 1e-4
"""Largest rounding error of a container's presentation times, in seconds."""

_SEEK_BACK = (0.0, 1.0, 5.0)
"""Seconds before the start to seek to, tried in turn until all frames from the start on decode."""

_BACKWARD = 0.1
"""Seconds by which a frame may precede the previous one, through rounding and odd muxers."""

_FLOATS = "f32"
"""Part of FFmpeg's names of floating point pixel formats."""

_MEASURED = frozenset({"mpeg", "mpegts"})
"""Containers without an index: the duration is a guess, and times may restart in the middle."""

_FAST = 240
"""Frames per second; a higher average is likely the clock rate, such as Matroska's 1000."""

_FRAME_PER_PACKET = frozenset({"hevc", "vvc"})
"""Decoders that skip undecodable frames, of codecs with exactly one frame per packet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Metadata of a media file, as displayed.

    Attributes:
      width: pixels, after rotation.
      height: pixels, after rotation.
      fps: frames per second on average; 0 for an image.
      num_frames: frame count of the container, or None if it stores none.
      duration: seconds, from the first frame to the end of the last; 0 for an image.
      rotation: clockwise rotation from stored to displayed frames, in degrees: 0, 90, 180 or 270.
      pixel_aspect: width of a displayed pixel over its height; 1 for nearly all files.
      codec: FFmpeg's name of the codec; for images, Pillow's name of the format.
      pix_fmt: FFmpeg's name of the pixel format; for images, Pillow's mode.
      has_audio: whether the file has an audio stream.
      is_image: whether the file is a single picture.
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
    """A decoded frame; `time` and `end` bound its display, in seconds after the file's first frame."""

    time: float
    end: float
    frame: av.VideoFrame


class VideoFile:
    """A video file, read forward from any time; not thread-safe.

    The constructor and all methods raise `BrokenClip` if the file is damaged or has no picture.
    """

    def __init__(self, file: pathlib.Path | io.BytesIO):
        self.name = str(file) if isinstance(file, pathlib.Path) else getattr(file, "name", "video in memory")
        self._file = file
        self._origin = 0.0
        self._open()
        try:
            self._origin = self._find_origin()
        except BrokenClip:
            self._container.close()
            raise

    def _open(self) -> None:
        self._container = open_container(self._file, self.name)
        try:
            with broken_clips(self.name, "cannot be opened as video"):
                self._stream = self._pick_stream()
                self._stream.codec_context.thread_count = 1
                self._tick = self._stream.time_base or Fraction(1, av.time_base)
                self._started = False
        except BrokenClip:
            self._container.close()
            raise

    def _reopen(self) -> None:
        """Goes back to the beginning by reopening the file: not every container can seek there."""
        self._container.close()
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        self._open()

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def info(self) -> VideoInfo:
        """Metadata of the file; decodes one frame."""
        frame = next(self._decode(None), None)
        if frame is None:
            raise BrokenClip(self.name, "the video stream has no frames")
        turn = orientation(frame)
        sides = (frame.width, frame.height)
        duration, count, rate = self._length()
        return VideoInfo(
            width=sides[turn.swaps_sides],
            height=sides[not turn.swaps_sides],
            fps=float(rate),
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
        """Yields frames in presentation order, beginning with the frame on screen at `start` (seconds).

        A key frame need not be a clean entry point: even in an intact file, decoding from it may yield frames
        that are late, damaged or missing. Then decoding restarts from an earlier key frame, and finally from
        the beginning of the file; only a failure from there counts as damage.
        """
        last_yielded = -math.inf
        for back in (*(back for back in _SEEK_BACK if start - back > 0), None):
            resume_after = last_yielded
            try:
                for frame in self._frames(start, back):
                    if frame.time > resume_after:
                        last_yielded = frame.time
                        yield frame
                return
            except BrokenClip:
                if back is None:
                    raise

    def pixel_aspect(self, turn: Orientation) -> float:
        """Width over height of a displayed pixel."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        return 1 / aspect if turn.swaps_sides else aspect

    def _pick_stream(self) -> VideoStream:
        """First video stream that is not cover art; in a file of still pictures, the default one."""
        kind = self._container.format.name
        if kind == "tty":
            raise BrokenClip(self.name, "a text file, not a video")
        if kind in RAW_FORMATS:
            raise BrokenClip(
                self.name, f"a raw {kind} stream has no times of frames: put it into an MP4 or MKV"
            )
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None
        ]
        if not streams:
            raise BrokenClip(self.name, "no video stream")
        if any(stream.disposition & Disposition.dependent for stream in streams):
            raise BrokenClip(
                self.name,
                f"a picture of {len(streams)} tiles, which is not supported: save it as JPEG or PNG",
            )
        if all(stream.frames == 1 and stream.duration is None for stream in streams):
            main = [stream for stream in streams if stream.disposition & Disposition.default]
            return (main or streams)[0]
        return streams[0]

    def _find_origin(self) -> float:
        """Display time of the first frame on the container's clock, in seconds."""
        if (
            self._container.format.name == "avi"
        ):  # AVI has no presentation times; FFmpeg's generated ones start late
            first = next(self._decode(None), None)
            return float((first.pts or 0) * self._tick) if first else 0.0
        return float((self._stream.start_time or 0) * self._tick)

    def _frames(self, start: float, back: float | None) -> Iterator[TimedFrame]:
        """Implements `frames_from`, decoding from `back` seconds before `start`, or from the beginning.

        Raises:
          BrokenClip: frames decoded from there are damaged or missing.
        """
        frames = self._timed(self._decode(None if back is None else start - back))
        shown = next(frames, None)
        if back is not None and (
            shown is None or shown.time > start + TIME_ROUNDING or not _is_entry(shown.frame)
        ):
            raise BrokenClip(self.name, f"no key frame before {start:.3f} s to begin with")
        # No frame is yielded until all frames up to `start` have decoded without error.
        for frame in frames:
            if shown is not None and frame.time > start + TIME_ROUNDING:
                yield shown
                shown = None
            if shown is None:
                yield frame
            else:
                shown = frame
        if shown is not None:
            yield shown

    def _timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[TimedFrame]:
        rate = self._stream.guessed_rate or self._stream.average_rate or Fraction(25)
        end = last = 0.0
        for frame in frames:
            base = frame.time_base or self._tick
            time = end if frame.pts is None else float(frame.pts * base) - self._origin
            length = float(frame.duration * base if frame.duration else 1 / rate)
            if time < last - max(_BACKWARD, 2 * length):
                raise BrokenClip(self.name, _joined(last, time))
            last, end = time, time + length
            yield TimedFrame(time, end, frame)

    def _decode(self, start: float | None) -> Iterator[av.VideoFrame]:
        """Frames in presentation order, from the key frame before `start`; None: from the first frame."""
        with broken_clips(self.name, "cannot be decoded"):
            if start is not None:
                self._seek(start)
            elif self._started:
                self._reopen()
            self._started = True
            pending = _PendingPackets() if self._stream.codec_context.name in _FRAME_PER_PACKET else None
            for packet in self._container.demux(self._stream):
                if pending:
                    pending.add(packet)
                for frame in packet.decode():
                    assert isinstance(frame, av.VideoFrame)
                    if frame.is_corrupt:
                        raise BrokenClip(self.name, f"damaged at {frame.time or 0.0:.3f} s")
                    if pending and (skipped := pending.skipped_before(frame)):
                        raise BrokenClip(
                            self.name, f"{skipped} frames before {frame.time or 0.0:.3f} s are not decoded"
                        )
                    if _FLOATS in frame.format.name and not np.isfinite(frame.to_ndarray()).all():
                        raise BrokenClip(self.name, f"pixels are not finite at {frame.time or 0.0:.3f} s")
                    yield frame

    def _seek(self, start: float) -> None:
        self._container.seek(round((start + self._origin) / self._tick), stream=self._stream, backward=True)

    def _length(self) -> tuple[float, int | None, float]:
        """Duration in seconds, number of frames (None if unknown) and frames per second."""
        duration, count = 0.0, self._stream.frames or None
        if self._container.format.name.startswith("mov") and len(self._stream.index_entries):
            # The header also counts frames that an edit list hides.
            count = count and sum(not entry.is_discard for entry in self._stream.index_entries)
        if self._stream.duration:
            duration = float(self._stream.duration * self._tick)
        elif tagged := _seconds(self._stream.metadata.get("DURATION", "")):
            duration = tagged - self._origin
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        unreliable = self._container.format.name in _MEASURED or duration <= 0
        if unreliable or not 0 < rate <= _FAST:
            duration, count, measured = self._measure()
            rate = rate if 0 < rate <= _FAST else measured
        return duration, count, rate

    def _measure(self) -> tuple[float, int, float]:
        """Same as `_length`, measured from the packets."""
        self._reopen()
        self._started = True
        times, end, clock = [], 0.0, -math.inf
        with broken_clips(self.name, "cannot be read to its end"):
            for packet in self._container.demux(self._stream):
                if packet.pts is None or packet.is_discard:
                    continue
                times.append(float(packet.pts * self._tick) - self._origin)
                end = max(end, times[-1] + float((packet.duration or 0) * self._tick))
                if packet.dts is not None:
                    last, clock = clock, float(packet.dts * self._tick) - self._origin
                    if clock < last - _BACKWARD / 2:
                        raise BrokenClip(self.name, _joined(last, clock))
        span = max(times, default=0.0) - min(times, default=0.0)
        rate = (len(times) - 1) / span if span > 0 else float(self._stream.guessed_rate or 1)
        return max(end, 0.0), len(times), rate


class _PendingPackets:
    """Presentation times of packets whose frames are still due, to detect frames that a decoder skipped."""

    def __init__(self) -> None:
        self._pending: set[int] = set()
        self._has_frame = False

    def add(self, packet: av.Packet) -> None:
        """Registers a packet that is about to be decoded."""
        if packet.pts is not None and not packet.is_discard:
            self._pending.add(packet.pts)

    def skipped_before(self, frame: av.VideoFrame) -> int:
        """Number of frames skipped between the previous frame and this one.

        Frames before the first one are skipped by design: they refer to data before the entry point.
        """
        if frame.pts is None:
            return 0
        skipped = sum(pts < frame.pts for pts in self._pending) if self._has_frame else 0
        self._has_frame = True
        self._pending = {pts for pts in self._pending if pts > frame.pts}
        return skipped


def orientation(frame: av.VideoFrame) -> Orientation:
    """Orientation of a frame, from its display matrix."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV fails on side data of an unknown type
        return Orientation(quarter_turns=round(-frame.rotation / 90) % 4)
    return UPRIGHT if matrix is None else Orientation.from_matrix(np.frombuffer(bytes(matrix), np.int32))


def _is_entry(frame: av.VideoFrame) -> bool:
    """Whether the decoder reports a key frame or an I picture; containers may flag any packet as key."""
    return frame.key_frame or frame.pict_type == PictureType.I


def _seconds(clock: str) -> float:
    """Seconds of a duration such as "00:01:02.5"; 0 if it does not parse."""
    try:
        hours, minutes, seconds = clock.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _joined(last: float, time: float) -> str:
    return (
        f"its times go back from {last:.2f} s to {time:.2f} s, as in files joined end to end: remux it "
        "with continuous times"
    )
