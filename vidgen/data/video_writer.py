"""Writes clips as MP4, GIF or PNG with text metadata, and reads the metadata back."""

import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, PngImagePlugin

from vidgen.core.errors import UserError
from vidgen.core.files import replacing
from vidgen.data.decoding import broken_clips, open_container
from vidgen.data.source import BrokenClip

__all__ = ["SUPPORTED_SUFFIXES", "read_metadata", "save_frames", "save_video", "write_mp4"]

SUPPORTED_SUFFIXES = (".mp4", ".gif", ".png")

_BT709 = 1
"""Code of BT.709 primaries, transfer curve and matrix in ITU-T H.273."""

_PNG_PREFIX = "vidgen:"
_SHORTEST_GIF_FRAME = 2
"""Hundredths of a second; viewers slow down shorter frames."""


def save_video(
    path: str | os.PathLike[str],
    video: np.ndarray,
    *,
    fps: float | int,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> None:
    """Writes a clip in the format of the file name's suffix.

    `.mp4`: H.264 in yuv420p with BT.709 tags, which every player shows; odd sides are made even by repeating
    the last image row or column. `.gif`: endless loop, 256 colours per frame, at most 50 fps. `.png`: one
    frame as a picture; several as a grid in reading order, as square as possible, padded with black.

    A missing folder is created. The file is written atomically.

    Args:
      path: ends in `.mp4`, `.gif` or `.png`.
      video: uint8 [t h w 3].
      fps: frames per second; ignored for PNG.
      metadata: texts stored in the file; `read_metadata` returns them.
      crf: quality of H.264: 0 is lossless except for the pixel format, 17 looks lossless, 28 is coarse.

    Raises:
      UserError: the suffix is unknown, or the array is not a clip.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUPPORTED_SUFFIXES:
        raise UserError(f'{path}: cannot write "{suffix}" files; use one of {", ".join(SUPPORTED_SUFFIXES)}.')
    _check_clip(path, video, fps)
    texts = dict(metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if suffix == ".mp4":
            write_mp4(temporary, video, fps=fps, metadata=texts, crf=crf)
        elif suffix == ".gif":
            temporary.write_bytes(_encode_gif(video, fps, texts))
        else:
            temporary.write_bytes(_encode_png(video, texts))


def save_frames(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    fps: float | int,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> None:
    """`save_video` for a stream of frames; an MP4 is written as they arrive, other formats at the end.

    Args:
      path: as in `save_video`.
      frames: uint8 [h w 3] each, at least one.
      fps: as in `save_video`.
      metadata: as in `save_video`.
      crf: as in `save_video`.

    Raises:
      UserError: there is no frame, one is no uint8 [h w 3] or of another size than the first, or `fps` is out
        of range.
    """
    path = pathlib.Path(path)
    checked = _checked(path, frames, fps)
    if path.suffix.lower() != ".mp4":
        save_video(path, np.stack(list(checked)), fps=fps, metadata=metadata, crf=crf)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_mp4(temporary, checked, fps=fps, metadata=metadata, crf=crf)


def _checked(path: pathlib.Path, frames: Iterable[np.ndarray], fps: float | int) -> Iterator[np.ndarray]:
    shape = None
    for number, frame in enumerate(frames):
        _check_clip(path, np.asarray(frame)[None], fps)
        if shape not in (None, frame.shape):
            raise UserError(f"{path}: frame {number} has the shape {frame.shape}, the first has {shape}.")
        shape = frame.shape
        yield frame
    if shape is None:
        raise UserError(f"{path}: the clip has no frames. Give it at least one.")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Texts that `save_video` stored in a file; for a file by other software, its container's texts.

    Raises:
      FileNotFoundError: the file does not exist.
      UserError: the file cannot be read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        if path.suffix.lower() in (".png", ".gif"):
            with (
                broken_clips(str(path), "cannot be opened"),
                Image.open(path, formats=("PNG", "GIF")) as image,
            ):
                return _image_texts(image)
        with open_container(path, str(path)) as container:
            texts = dict(container.metadata)
    except BrokenClip as error:
        raise UserError(f"{path}: cannot read it: {error.reason}") from error
    return _parse(texts.get("comment", "")) or texts


def write_mp4(
    target: pathlib.Path | io.BytesIO,
    frames: Iterable[np.ndarray],
    *,
    fps: float | int,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
    preset: str = "medium",
    pix_fmt: str = "yuv420p",
) -> None:
    """Writes an MP4 file with H.264 and BT.709 tags; on disk, the index precedes the frames.

    Args:
      target: path of the file, or a buffer in memory.
      frames: uint8 [h w 3] each, at least one, or a clip [t h w 3]; consumed one by one. In yuv420p, odd
        sides are made even by repeating the last image row or column.
      fps: frames per second.
      metadata: texts, stored as JSON in the container's comment.
      crf: quality of H.264; 0 with `pix_fmt="rgb24"` is lossless.
      preset: preset of x264, "ultrafast" to "veryslow".
      pix_fmt: "yuv420p" plays everywhere; "yuv444p" allows odd sides and keeps full colour resolution;
        "rgb24" is x264's RGB mode. Few players show the latter two.
    """
    pictures = map(_pad_to_even, frames) if pix_fmt == "yuv420p" else iter(frames)
    first = next(pictures)
    rgb = pix_fmt == "rgb24"
    options = {"movflags": "+faststart"} if isinstance(target, pathlib.Path) else {}
    file = str(target) if isinstance(target, pathlib.Path) else target
    with av.open(file, "w", format="mp4", options=options) as container:
        if metadata:
            container.metadata["comment"] = json.dumps(dict(metadata))
        stream = container.add_stream("libx264rgb" if rgb else "libx264", rate=_rate(fps))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {"crf": str(crf), "preset": preset}
        context = stream.codec_context
        context.color_primaries = context.color_trc = _BT709
        if not rgb:
            context.colorspace = _BT709
            context.color_range = int(ColorRange.MPEG)
        reformatter = VideoReformatter()
        for pixels in itertools.chain([first], pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if not rgb:
                frame = reformatter.reformat(
                    frame,
                    format=pix_fmt,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
                    threads=1,
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _check_clip(path: pathlib.Path, video: np.ndarray, fps: float | int) -> None:
    found = f"{getattr(video, 'dtype', type(video).__name__)} {list(np.shape(video))}"
    if np.ndim(video) != 4 or np.shape(video)[-1] != 3 or video.dtype != np.uint8:
        raise UserError(f"{path}: a clip is uint8 [frames, height, width, 3]; got {found}.")
    if video.size == 0:
        raise UserError(f"{path}: the clip is empty: {found}. Give it at least one frame with pixels.")
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"{path}: fps is {fps}; expected a positive number.")


def _rate(fps: float | int) -> Fraction:
    """Frames per second as a fraction of small numbers; NTSC rates such as 29.97 become n * 1000 / 1001."""
    ntsc = Fraction(1000 * round(fps * 1.001), 1001)
    if fps != round(fps) and abs(ntsc - fps) < 0.005:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


def _pad_to_even(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode_gif(video: np.ndarray, fps: float | int, metadata: Mapping[str, str]) -> bytes:
    frames = [Image.fromarray(np.ascontiguousarray(frame)).quantize(256) for frame in video]
    ends = [round(100 * (index + 1) / fps) for index in range(len(frames))]
    durations = [max(_SHORTEST_GIF_FRAME, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[10 * duration for duration in durations],
        loop=0,
        comment=json.dumps(dict(metadata)).encode() if metadata else b"",
    )
    return buffer.getvalue()


def _encode_png(video: np.ndarray, metadata: Mapping[str, str]) -> bytes:
    texts = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        texts.add_itxt(_PNG_PREFIX + key, value)
    buffer = io.BytesIO()
    Image.fromarray(_grid(video)).save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def _grid(video: np.ndarray) -> np.ndarray:
    """Frames of a clip as a grid in reading order: uint8 [h w 3]."""
    count, height, width, channels = video.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = video
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def _image_texts(image: Image.Image) -> dict[str, str]:
    if image.format == "GIF":
        return _parse(image.info.get("comment", b"").decode("utf-8", "replace"))
    texts = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    prefixed = {
        key.removeprefix(_PNG_PREFIX): value for key, value in texts.items() if key.startswith(_PNG_PREFIX)
    }
    return prefixed or texts


def _parse(comment: str) -> dict[str, str]:
    """Texts of a comment that `save_video` wrote; any other comment is one text."""
    if not comment:
        return {}
    try:
        texts = json.loads(comment)
    except ValueError:
        return {"comment": comment}
    return (
        {key: str(value) for key, value in texts.items()} if isinstance(texts, dict) else {"comment": comment}
    )
