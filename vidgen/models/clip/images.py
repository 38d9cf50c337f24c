"""Preprocessing of images for CLIP's image encoder."""

import numpy as np
from PIL import Image

from vidgen.core.typing import Float, UInt8

__all__ = ["prepare"]

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""RGB mean and standard deviation of CLIP's training images, for pixels in [0, 1]."""


def prepare(image: UInt8[np.ndarray, "h w 3"], size: int = 224) -> Float[np.ndarray, "{size} {size} 3"]:
    """Centre crop of an image, resized (bicubic) and normalised by CLIP's statistics.

    As in transformers' `CLIPImageProcessor`, the shorter side is resized to `size` before the crop.
    """
    height, width = image.shape[:2]
    factor = size / min(height, width)
    shape = (max(size, int(width * factor)), max(size, int(height * factor)))
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    square = resized[top : top + size, left : left + size].astype(np.float32) / 255.0
    return (square - _MEAN) / _DEVIATION
