"""Images and videos, as folders of clips and as files of commands."""

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.data.conftest import numbered_frame, write_frames
from tests.fuzz.mutate import damage_bytes, damage_png
from tests.fuzz.target import Target
from vidgen.data.check import find_damage
from vidgen.data.folder import FolderData, FolderSource
from vidgen.data.source import BrokenClip
from vidgen.data.video_io import read_clip, read_frames
from vidgen.data.video_writer import read_metadata, save_video

SIDE, FRAMES = 32, 9
_PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), np.uint8)


def _make_image(folder: pathlib.Path, name: str, channels: int = 3, **options) -> None:
    """With EXIF data that turns it, and a text, where the format has them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_PICTURE[..., :channels]).save(folder / name, exif=exif, **options)


def _make_float(folder: pathlib.Path) -> None:
    Image.fromarray(_PICTURE[..., 0].astype(np.float32) / 255).save(folder / "a.tiff")


def _make_bmp(folder: pathlib.Path) -> None:
    Image.fromarray(_PICTURE[..., :3]).save(folder / "a.bmp")


def _make_deep(folder: pathlib.Path) -> None:
    Image.fromarray(_PICTURE[..., 0].astype(np.uint16) * 257).save(folder / "a.png")


def _read_image(folder: pathlib.Path) -> None:
    """As training does, and as a first frame is read."""
    _read_folder(folder, num_frames=1)
    read_clip(next(folder.iterdir()))


def _read_folder(folder: pathlib.Path, num_frames: int) -> None:
    data = FolderData(path=str(folder), num_frames=num_frames, height=16, width=24, fps=8.0)
    report = data.scan()
    for file in report.used:
        find_damage(file.path, file.info, full=True)
        find_damage(file.path, file.info, full=False)
    source = FolderSource(data, report.used)
    for index in {0, 1, len(source) // 2, len(source) - 1}:
        try:
            if 0 <= index < len(source):
                assert source[index]["video"].shape == (num_frames, 16, 24, 3)
        except BrokenClip:
            continue


def _make_video(folder: pathlib.Path, name: str, **options) -> None:
    frames = [numbered_frame(index, SIDE, 2 * SIDE) for index in range(FRAMES)]
    write_frames(folder / name, frames, fps=8, **options)


def _make_stored(folder: pathlib.Path, name: str) -> None:
    """With the texts that `vidgen sample` stores."""
    video = np.stack([numbered_frame(index, SIDE, 2 * SIDE) for index in range(3)])
    texts = {"vidgen": json.dumps({"prompt": "a red circle", "seed": 1}), "other": "x"}
    save_video(folder / name, video, fps=8, metadata=texts)


def _read_video(folder: pathlib.Path) -> None:
    """As training does, and to the end, as `vidgen encode` does."""
    _read_folder(folder, num_frames=2)
    path = next(folder.iterdir())
    for _ in read_frames(path, fps=8.0, height=16, width=24):
        pass


def _read_stored(folder: pathlib.Path) -> None:
    path = next(folder.iterdir())
    texts = read_metadata(path)
    assert all(isinstance(text, str) for text in (*texts, *texts.values()))
    read_clip(path)


def _image(name: str, donor: str, damage=damage_bytes, **options) -> Target:
    make = functools.partial(_make_image, name=name, **options)
    return _of(make, _read_image, damage, donor)


def _video(name: str, donor: str, **options) -> Target:
    return _of(functools.partial(_make_video, name=name, **options), _read_video, damage_bytes, donor)


def _of(make: Callable[[pathlib.Path], None], read, damage, donor: str | None = None) -> Target:
    return Target(make=make, damaged={"*": damage}, read=read, donor=donor)


TARGETS = {
    "png": _image("a.png", "jpg", damage_png, channels=4),
    "png_deep": _of(_make_deep, _read_image, damage_png, "png"),
    "jpg": _image("a.jpg", "jpg_progressive"),
    "jpg_progressive": _image("a.jpeg", "jpg", progressive=True, quality=95),
    "webp": _image("a.webp", "webp_lossless", channels=4),
    "webp_lossless": _image("a.webp", "webp", lossless=True),
    "avif": _image("a.avif", "webp", speed=10),
    "tiff": _image("a.tif", "tiff_float", compression="tiff_lzw"),
    "tiff_deflate": _image("a.tiff", "tiff", compression="tiff_adobe_deflate"),
    "tiff_float": _of(_make_float, _read_image, damage_bytes, "tiff"),
    "bmp": _of(_make_bmp, _read_image, damage_bytes),
    "mp4": _video("a.mp4", "mov"),
    "mp4_hevc": _video("a.mp4", "mp4", codec="libx265", options={"x265-params": "log-level=none:pools=none"}),
    "mov": _video("a.mov", "mp4", codec="mpeg4"),
    "mov_png": _video("a.mov", "mp4", codec="png", pix_fmt="rgb24"),
    "mkv": _video("a.mkv", "webm"),
    "mkv_ffv1": _video("a.mkv", "mkv", codec="ffv1", pix_fmt="yuv444p"),
    "webm": _video("a.webm", "mkv", codec="libvpx-vp9", options={"deadline": "realtime"}),
    "ts": _video("a.ts", "mp4"),
    "avi": _video("a.avi", "mov", codec="mpeg4"),
    "y4m": _video("a.y4m", "avi", codec="rawvideo"),
    "gif": _of(functools.partial(_make_stored, name="a.gif"), _read_video, damage_bytes, "png"),
    "stored_mp4": _of(functools.partial(_make_stored, name="a.mp4"), _read_stored, damage_bytes, "mp4"),
    "stored_gif": _of(functools.partial(_make_stored, name="a.gif"), _read_stored, damage_bytes),
    "stored_png": _of(functools.partial(_make_stored, name="a.png"), _read_stored, damage_png),
}
