"""The one door to the decoders of media files: which formats are read, and what a failure becomes."""

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
"""FFmpeg's names of coded video without a container: no times, and no frame rate that can be relied on."""

_CONTAINERS = (
    "apng", "asf", "avi", "dv", "flv", "gif", "gxf", "ivf", "jpegxl_anim", "matroska", "mov", "mpeg",
    "mpegts", "mxf", "nsv", "nut", "nuv", "ogg", "rm", "swf", "tty", "webm", "wtv", "yuv4mpegpipe",
)
"""Formats that hold all of their data in the one file. Playlists, manifests and patterns of names (hls, dash,
concat, sdp, image2) are none of them; tty is text, which is refused by its name."""

_PICTURES = (
    "bmp", "dds", "dpx", "exr", "gem", "hdr", "j2k", "jpeg", "jpegls", "jpegxl", "jpegxs", "pam", "pbm",
    "pcx", "pfm", "pgm", "pgmyuv", "pgx", "phm", "photocd", "pictor", "png", "ppm", "psd", "qoi", "sgi",
    "sunrast", "tiff", "vbn", "webp", "xbm", "xpm", "xwd",
)
# fmt: on

_FORMATS = ",".join([*_CONTAINERS, *sorted(RAW_FORMATS), *(f"{name}_pipe" for name in _PICTURES)])


@contextlib.contextmanager
def broken_clips(name: str, failed: str) -> Iterator[None]:
    """Turns whatever a decoder raises into that file's reason: every call of PyAV and Pillow is inside one.

    Both libraries raise errors of many types on damaged, hostile or unknown files (RuntimeError of AVIF,
    ValueError of unknown side data, MemoryError of absurd sizes), and one file must not end a run.

    Args:
      name: the file's.
      failed: what could not be done, before the decoder's own words.

    Raises:
      BrokenClip: in the place of any `Exception`.
    """
    try:
        yield
    except BrokenClip:
        raise
    except MemoryError as error:
        raise BrokenClip(name, f"{failed}: it takes more memory than there is") from error
    except Exception as error:
        raise BrokenClip(name, f"{failed}: {_reason(error)}") from error


def open_container(file: pathlib.Path | io.BytesIO, name: str) -> InputContainer:
    """Opens a video file, or one in memory, by a format that reads nothing but this file.

    Raises:
      BrokenClip: it is no regular file, or cannot be opened.
    """
    if isinstance(file, pathlib.Path) and file.exists() and not file.is_file():
        raise BrokenClip(name, "not a regular file")
    with broken_clips(name, "cannot be opened as video"):
        try:
            return av.open(
                # Without the protocol, "12:30.mp4" would be taken for one.
                f"file:{file}" if isinstance(file, pathlib.Path) else file,
                "r",
                metadata_errors="replace",
                container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            )
        except ArgumentError as error:
            if error.errno != errno.EINVAL:
                raise
            raise BrokenClip(
                name, "not a format that is read as video; playlists and manifests are no clips"
            ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
