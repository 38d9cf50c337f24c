"""Similarity of two videos: PSNR, SSIM and flicker.

All take 8-bit videos, or floats with pixels in [0, 1]. PSNR and SSIM give one value per frame, flicker one
per pair of consecutive frames.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vidgen.core.errors import UserError
from vidgen.core.typing import Float, Shaped, UInt8, Video

__all__ = ["SMALLEST_FRAME", "evaluate_reconstruction", "flicker", "psnr", "ssim"]

SMALLEST_ERROR = 1e-10
"""Floor of the mean squared error: equal frames score 100 dB instead of infinity."""
WINDOW, SIGMA = 11, 1.5
SMALLEST_FRAME = WINDOW
"""Smallest side of a frame for `ssim`, in pixels."""


def psnr(
    video: Shaped[np.ndarray, "*b h w c"], reference: Shaped[np.ndarray, "*b h w c"]
) -> Float[np.ndarray, "*b"]:
    """Peak signal-to-noise ratio of each frame in decibels, at most 100."""
    error = np.square(_unit(video) - _unit(reference)).mean(axis=(-3, -2, -1))
    return -10 * np.log10(np.maximum(error, SMALLEST_ERROR))


def ssim(
    video: Shaped[np.ndarray, "*b h w c"], reference: Shaped[np.ndarray, "*b h w c"]
) -> Float[np.ndarray, "*b"]:
    """Structural similarity of each frame, in [-1, 1]: mean over channels and over complete 11 x 11 windows.

    Gaussian window of sigma 1.5, k1 = 0.01, k2 = 0.03 (Wang et al. 2004, Image quality assessment: from error
    visibility to structural similarity, section III-B).

    Raises:
        UserError: frames are smaller than the window.
    """
    if min(video.shape[-3:-1]) < WINDOW:
        raise UserError(
            f"frames are {video.shape[-3]} x {video.shape[-2]}; ssim needs at least {WINDOW} x {WINDOW}"
        )
    x, y = _unit(video), _unit(reference)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x, variance_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(axis=(-3, -2, -1))


def flicker(
    video: Shaped[np.ndarray, "*b t h w c"], reference: Shaped[np.ndarray, "*b t h w c"]
) -> Float[np.ndarray, "*b pairs"]:
    """Temporal flicker: difference between the frame-to-frame changes of the video and of the reference.

    Mean over pixels of |(v[t + 1] - v[t]) - (r[t + 1] - r[t])| in 8-bit levels, 0 to 510, for each of the
    t - 1 pairs. Constant errors cost nothing, fluctuating errors do. The reference makes warping along the
    motion unnecessary. It is the absolute form of dtSSD (Erofeev et al. 2015, Perceptually motivated
    benchmark for video matting) in the unit of VBench's temporal flickering (arXiv:2311.17982), which is for
    still scenes and has no reference.
    """
    error = _unit(video) - _unit(reference)
    return 255 * np.abs(np.diff(error, axis=-4)).mean(axis=(-3, -2, -1))


def evaluate_reconstruction(
    reconstruct: Callable[[Video], Video], batches: Iterable[UInt8[np.ndarray, "_ _ _ _ 3"]]
) -> dict[str, float]:
    """Scores an autoencoder.

    Args:
        reconstruct: encodes and decodes a batch with pixels in [-1, 1]; preserves its shape.
        batches: 8-bit clips [b t h w 3]; batches may differ in size.

    Returns:
        `psnr` in decibels and `ssim`, means over all frames after rounding to 8 bits; `num_clips`.

    Raises:
        UserError: there are no clips, or the shape changed.
    """
    scores: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    num_clips = 0
    for batch in batches:
        output = np.asarray(reconstruct(jnp.asarray(batch, jnp.float32) / 127.5 - 1), np.float32)
        if output.shape != batch.shape:
            raise UserError(f"reconstruct made {output.shape} out of {batch.shape}; expected the same shape")
        rounded = np.clip(np.rint((output + 1) * 127.5), 0, 255).astype(np.uint8)
        scores["psnr"].append(psnr(rounded, batch).ravel())
        scores["ssim"].append(ssim(rounded, batch).ravel())
        num_clips += len(batch)
    if not num_clips:
        raise UserError("there are no clips to reconstruct; give at least one batch")
    return {name: float(np.concatenate(values).mean()) for name, values in scores.items()} | {
        "num_clips": float(num_clips)
    }


def _unit(video: np.ndarray) -> np.ndarray:
    return video.astype(np.float64) / 255 if video.dtype == np.uint8 else video.astype(np.float64)


def _smooth(video: np.ndarray) -> np.ndarray:
    """Gaussian-weighted means over the windows inside the frame."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offset**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        video = ndimage.correlate1d(video, weights, axis=axis, mode="nearest")
    margin = WINDOW // 2
    return video[..., margin:-margin, margin:-margin, :]
