"""Pictures from image files, through Pillow."""

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
"""The EXIF orientations that swap width and height."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is looked for in a file, whatever its name: none of them runs a program, as Pillow does for EPS."""


def is_image(path: pathlib.Path) -> bool:
    """Whether a file is read as one picture, by its name; a GIF is a video."""
    return path.suffix.lower() in _SUFFIXES


def probe_image(path: pathlib.Path) -> tuple[int, int, str, str]:
    """Width and height as shown, format and pixel mode; reads the header only.

    Raises:
      BrokenClip: it cannot be read.
    """
    with broken_clips(str(path), "cannot be opened as an image"), Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in _TURNED:
            width, height = height, width
        return width, height, (image.format or "unknown").lower(), image.mode


def read_image(
    path: pathlib.Path, *, size: tuple[int, int] | None, crop_at: tuple[float, float] = (0.5, 0.5)
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture, turned as its EXIF data says, laid on white where transparent, resized and cropped.

    Of a file with several pictures, the first. Depths above 8 bits are cut to 8; floating point numbers are
    0 to 1 or, where one is above 1, 0 to 255.

    Args:
      path: the file.
      size: height and width to cover; None keeps the picture's.
      crop_at: where the crop lies between top and bottom and between left and right, each in [0, 1].

    Raises:
      BrokenClip: it cannot be read, or has pixels that are not finite.
    """
    with broken_clips(str(path), "cannot be decoded as an image"):
        with Image.open(path, formats=_FORMATS) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
        return fit_image(image, size, crop_at=crop_at)


def fit_image(
    image: Image.Image, size: tuple[int, int] | None, *, crop_at: tuple[float, float] = (0.5, 0.5)
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as RGB, resized to cover `size` (height and width) and cropped; None keeps its size."""
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
