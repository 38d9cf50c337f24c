"""An open video file: what it holds, and its frames from any time on."""

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
"""Seconds by which a presentation time may be off through rounding in its container."""

_SEEK_BACK = (0.0, 1.0, 5.0)
"""Seconds before the wanted start that are sought, in turn, until frames come out whole from there on."""

_BACKWARD = 0.1
"""Seconds by which a frame may be earlier than the one before it through rounding and odd muxers."""

_FLOATS = "f32"
"""In the names of FFmpeg's pixel formats of floating point numbers."""

_MEASURED = frozenset({"mpeg", "mpegts"})
"""Containers without an index, whose duration is a guess and whose times may begin anew in the middle."""

_FAST = 240
"""Frames per second; above, the average is likely that of the clock, such as 1000 of Matroska."""

_FRAME_PER_PACKET = frozenset({"hevc", "vvc"})
"""Decoders that leave out frames they cannot decode, of codecs whose every packet is a frame."""


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
        self._file = file
        self._origin = 0.0
        self._open()
        self._origin = self._find_origin()

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
        """Goes back to the beginning, which not every container can seek."""
        self._container.close()
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        self._open()

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def info(self) -> VideoInfo:
        """What the file holds; decodes one frame."""
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
        """Frames in the order of presentation, from the one that is on screen at `start` (seconds) on.

        A key frame need not be a clean entry point: what is decoded from it may come too late, be damaged or
        lack frames though the file is whole. Then an earlier one is sought, and at last all is decoded from
        the beginning; only what fails there is a fault of the file.
        """
        given = -math.inf
        for back in (*(back for back in _SEEK_BACK if start - back > 0), None):
            skipped = given
            try:
                for frame in self._frames(start, back):
                    if frame.time > skipped:
                        given = frame.time
                        yield frame
                return
            except BrokenClip:
                if back is None:
                    raise

    def pixel_aspect(self, turn: Orientation) -> float:
        """Width over height of a pixel, as shown."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        return 1 / aspect if turn.swaps_sides else aspect

    def _pick_stream(self) -> VideoStream:
        """The first video stream that is not a cover picture; of a file of pictures, the main one."""
        kind = self._container.format.name
        if kind == "tty":
            raise BrokenClip(self.name, "a text file, not a video")
        if kind in RAW_FORMATS:
            raise BrokenClip(
                self.name, f"a raw {kind} stream, which has no times of frames: put it into an MP4 or MKV"
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
                f"a picture of {len(streams)} tiles, which are not put together: save it as JPEG or PNG",
            )
        if all(stream.frames == 1 and stream.duration is None for stream in streams):
            main = [stream for stream in streams if stream.disposition & Disposition.default]
            return (main or streams)[0]
        return streams[0]

    def _find_origin(self) -> float:
        """Seconds on the container's clock at which the first frame is shown."""
        if (
            self._container.format.name == "avi"
        ):  # has no presentation times; those that are made up start late
            first = next(self._decode(None), None)
            return float((first.pts or 0) * self._tick) if first else 0.0
        return float((self._stream.start_time or 0) * self._tick)

    def _frames(self, start: float, back: float | None) -> Iterator[TimedFrame]:
        """As `frames_from`, decoded from `back` seconds before `start`, or from the beginning.

        Raises:
          BrokenClip: frames from there on are not whole.
        """
        frames = self._timed(self._decode(None if back is None else start - back))
        shown = next(frames, None)
        if back is not None and (
            shown is None or shown.time > start + TIME_ROUNDING or not _is_entry(shown.frame)
        ):
            raise BrokenClip(self.name, f"no key frame before {start:.3f} s to begin with")
        # None is handed out before all of those up to the start are known to be whole.
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
        """Frames in the order of presentation, from the key frame before `start`, or from the first one."""
        with broken_clips(self.name, "cannot be decoded"):
            if start is not None:
                self._seek(start)
            elif self._started:
                self._reopen()
            self._started = True
            promised = _Promised() if self._stream.codec_context.name in _FRAME_PER_PACKET else None
            for packet in self._container.demux(self._stream):
                if promised:
                    promised.add(packet)
                for frame in packet.decode():
                    assert isinstance(frame, av.VideoFrame)
                    if frame.is_corrupt:
                        raise BrokenClip(self.name, f"damaged at {frame.time or 0.0:.3f} s")
                    if promised and (lost := promised.lost(frame)):
                        raise BrokenClip(
                            self.name, f"{lost} frames before {frame.time or 0.0:.3f} s are not decoded"
                        )
                    if _FLOATS in frame.format.name and not np.isfinite(frame.to_ndarray()).all():
                        raise BrokenClip(self.name, f"pixels are not finite at {frame.time or 0.0:.3f} s")
                    yield frame

    def _seek(self, start: float) -> None:
        self._container.seek(round((start + self._origin) / self._tick), stream=self._stream, backward=True)

    def _length(self) -> tuple[float, int | None, float]:
        """The duration in seconds, the number of frames or None where unknown, and frames per second."""
        duration, count = 0.0, self._stream.frames or None
        if self._container.format.name.startswith("mov") and len(self._stream.index_entries):
            # The header counts frames that an edit list hides, too.
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
        """As `_length`, from the packets."""
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


class _Promised:
    """The times of the packets that have been decoded, against those of the frames that came out."""

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._begun = False

    def add(self, packet: av.Packet) -> None:
        """Notes a packet that is about to be decoded."""
        if packet.pts is not None and not packet.is_discard:
            self._waiting.add(packet.pts)

    def lost(self, frame: av.VideoFrame) -> int:
        """How many frames should have come out between the frame before and this one.

        Those before the first one are left out by intention: they refer to what comes before the entry point.
        """
        if frame.pts is None:
            return 0
        lost = sum(pts < frame.pts for pts in self._waiting) if self._begun else 0
        self._begun = True
        self._waiting = {pts for pts in self._waiting if pts > frame.pts}
        return lost


def orientation(frame: av.VideoFrame) -> Orientation:
    """How a frame is turned to be shown, from its display matrix."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # other side data of a kind that PyAV does not know
        return Orientation(quarter_turns=round(-frame.rotation / 90) % 4)
    return UPRIGHT if matrix is None else Orientation.from_matrix(np.frombuffer(bytes(matrix), np.int32))


def _is_entry(frame: av.VideoFrame) -> bool:
    """Whether the decoder holds a frame for one that needs no other; a container may say so of any."""
    return frame.key_frame or frame.pict_type == PictureType.I


def _seconds(clock: str) -> float:
    """Of a duration such as "00:01:02.5"; 0 where there is none."""
    try:
        hours, minutes, seconds = clock.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _joined(last: float, time: float) -> str:
    return (
        f"its times go back from {last:.2f} s to {time:.2f} s, as in files joined end to end: write it "
        "anew with continuous times"
    )
