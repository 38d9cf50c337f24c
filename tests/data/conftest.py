"""Tiny media files made on the spot, whose frames show their own number."""

import pathlib
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
import pytest

_BITS = 8


def numbered_frame(number: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A frame that shows a number in binary, as eight black or white columns."""
    bits = [(number >> bit) & 1 for bit in range(_BITS)]
    columns = np.repeat(np.array(bits, np.uint8) * 255, width // _BITS)
    columns = np.pad(columns, (0, width - len(columns)), mode="edge")
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def read_number(frame: np.ndarray) -> int:
    """The number that a frame shows, whatever its size."""
    width = frame.shape[1]
    centres = [int((bit + 0.5) * width / _BITS) for bit in range(_BITS)]
    return sum((int(frame[:, x].mean()) > 127) << bit for bit, x in enumerate(centres))


def write_frames(
    path: pathlib.Path,
    frames: Sequence[np.ndarray],
    *,
    fps: float = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    hflip: bool = False,
    times: Sequence[float] | None = None,
    source_format: str = "rgb24",
) -> pathlib.Path:
    """Writes a video with PyAV alone; `times` are presentation times in seconds, for a variable rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps).limit_denominator(1001), options=options or {}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=source_format)
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def numbered() -> Callable[..., np.ndarray]:
    return numbered_frame


@pytest.fixture
def number_of() -> Callable[[np.ndarray], int]:
    return read_number


@pytest.fixture
def write() -> Callable[..., pathlib.Path]:
    return write_frames


@pytest.fixture
def numbered_video(tmp_path) -> Callable[..., pathlib.Path]:
    """Makes a video of `count` numbered frames; keywords as of `write`."""

    def make(name: str, count: int, *, height: int = 32, width: int = 64, **keywords) -> pathlib.Path:
        return write_frames(
            tmp_path / name, [numbered_frame(index, height, width) for index in range(count)], **keywords
        )

    return make


@pytest.fixture
def shared_clips() -> pathlib.Path:
    """Real clips, where there are any."""
    folder = pathlib.Path(__file__).parents[2] / ".." / "shared" / "clips"
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder.resolve()} is absent")
    return folder.resolve()
