"""Image files as RGB arrays, through Pillow."""

import pathlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vidgen.core.errors import UserError
from vidgen.core.typing import UInt8
from vidgen.data.decoding import broken_clips
from vidgen.data.geometry import Crop

__all__ = ["fit_image", "is_image", "probe_image", "read_image"]

_SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_TURNED = frozenset({5, 6, 7, 8})
"""EXIF orientations that swap width and height."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats accepted under any file name. None of them runs a program, as Pillow does for EPS."""


def is_image(path: pathlib.Path) -> bool:
    """Whether the file name is that of a still image; a GIF is read as video."""
    return path.suffix.lower() in _SUFFIXES


def probe_image(path: pathlib.Path) -> tuple[int, int, str, str]:
    """Displayed width and height, format and pixel mode; reads only the header.

    Raises:
      BrokenClip: the file cannot be read.
    """
    with broken_clips(str(path), "cannot be opened as an image"), Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in _TURNED:
            width, height = height, width
        return width, height, (image.format or "unknown").lower(), image.mode


def read_image(
    path: pathlib.Path, *, size: tuple[int, int] | None, crop_at: tuple[float, float] = (0.5, 0.5)
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture as RGB: rotated by its EXIF data, composited over white, resized and cropped.

    Of several pictures in a file, the first is read. Depths above 8 bits are reduced to 8. Floating point
    pixels range from 0 to 1 or, if any is above 1, from 0 to 255.

    Args:
      path: an image file.
      size: height and width to cover; None keeps the picture's size.
      crop_at: position of the crop between top and bottom and between left and right, each in [0, 1].

    Raises:
      BrokenClip: the file cannot be read, or has pixels that are not finite.
    """
    with broken_clips(str(path), "cannot be decoded as an image"):
        with Image.open(path, formats=_FORMATS) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
        return fit_image(image, size, crop_at=crop_at)


def fit_image(
    image: Image.Image, size: tuple[int, int] | None, *, crop_at: tuple[float, float] = (0.5, 0.5)
) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a picture to RGB, resized to cover `size` (height, width) and cropped; None keeps its size."""
    image = _to_rgb(image)
    crop = Crop.covering((image.height, image.width), size, crop_at=crop_at)
    if crop.resized != (image.height, image.width):
        image = image.resize((crop.resized[1], crop.resized[0]), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(crop.apply(np.asarray(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        values = np.asarray(image)
        if not (finite := np.isfinite(values)).all():
            row, column = np.argwhere(~finite)[0]
            raise UserError(f"pixels are not finite, the first in row {row}, column {column}")
        scaled = values * (255 if values.max() <= 1 else 1)
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):
        shift = 8 if image.mode.startswith("I;16") or np.max(np.asarray(image)) > 255 else 0
        grey = np.right_shift(np.asarray(image).astype(np.int64), shift)
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
