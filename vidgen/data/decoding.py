"""Single entry point to all media decoders: accepted formats, and errors converted to `BrokenClip`."""

import contextlib
import errno
import io
import pathlib
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.error import ArgumentError

from vidgen.data.source import BrokenClip

__all__ = ["RAW_FORMATS", "broken_clips", "open_container"]

# fmt: off
RAW_FORMATS = frozenset((
    "apv", "av1", "avs2", "avs3", "cavsvideo", "dirac", "evc", "h261", "h263", "h264", "hevc", "m4v", "mjpeg",
    "mjpeg_2000", "mpegvideo", "obu", "vc1", "vvc",
))
"""FFmpeg's names of elementary streams without a container: no timestamps, no reliable frame rate."""

_CONTAINERS = (
    "apng", "asf", "avi", "dv", "flv", "gif", "gxf", "ivf", "jpegxl_anim", "matroska", "mov", "mpeg",
    "mpegts", "mxf", "nsv", "nut", "nuv", "ogg", "rm", "swf", "tty", "webm", "wtv", "yuv4mpegpipe",
)
"""Formats that hold all data in one file. Playlists, manifests and filename patterns (hls, dash, concat, sdp,
image2) are excluded; tty is plain text, listed so that `VideoFile` can reject it by name."""

_PICTURES = (
    "bmp", "dds", "dpx", "exr", "gem", "hdr", "j2k", "jpeg", "jpegls", "jpegxl", "jpegxs", "pam", "pbm",
    "pcx", "pfm", "pgm", "pgmyuv", "pgx", "phm", "photocd", "pictor", "png", "ppm", "psd", "qoi", "sgi",
    "sunrast", "tiff", "vbn", "webp", "xbm", "xpm", "xwd",
)
# fmt: on

_FORMATS = ",".join([*_CONTAINERS, *sorted(RAW_FORMATS), *(f"{name}_pipe" for name in _PICTURES)])


@contextlib.contextmanager
def broken_clips(name: str, failed: str) -> Iterator[None]:
    """Converts any decoder error to `BrokenClip`; every call of PyAV and Pillow runs in this context.

    Both libraries raise errors of many types on damaged, hostile or unknown files (RuntimeError for AVIF,
    ValueError for unknown side data, MemoryError for absurd sizes), and one file must not end a run.

    Args:
      name: name of the file.
      failed: the failed operation, which precedes the decoder's message.

    Raises:
      BrokenClip: replaces any `Exception`.
    """
    try:
        yield
    except BrokenClip:
        raise
    except MemoryError as error:
        raise BrokenClip(name, f"{failed}: not enough memory") from error
    except Exception as error:
        raise BrokenClip(name, f"{failed}: {_reason(error)}") from error


def open_container(file: pathlib.Path | io.BytesIO, name: str) -> InputContainer:
    """Opens a video, from a file or from memory, in a format that reads no other file.

    Raises:
      BrokenClip: the path is not a regular file, or cannot be opened.
    """
    if isinstance(file, pathlib.Path) and file.exists() and not file.is_file():
        raise BrokenClip(name, "not a regular file")
    with broken_clips(name, "cannot be opened as video"):
        try:
            return av.open(
                # Without "file:", FFmpeg parses the "12" of "12:30.mp4" as a protocol.
                f"file:{file}" if isinstance(file, pathlib.Path) else file,
                "r",
                metadata_errors="replace",
                container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            )
        except ArgumentError as error:
            if error.errno != errno.EINVAL:
                raise
            raise BrokenClip(
                name, "not a supported video format; playlists and manifests are no clips"
            ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
