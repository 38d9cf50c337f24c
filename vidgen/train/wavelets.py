"""A loss on sharpness and motion without a pretrained network: errors in Haar subbands."""

import itertools

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array, Float, Video

__all__ = ["haar", "wavelet_loss"]

_AXES = (1, 2, 3)


def haar(video: Video, levels: int) -> list[Float[Array, "b t2 h2 w2 c"]]:
    """Subbands of a Haar transform over time, height and width.

    Low bands are means of neighbours and high bands half their differences, so every band is in pixel units.
    An axis of odd length repeats its first element: the first of 1 + 4n frames pairs with itself, and an
    image is a still video.

    Returns:
      The seven high bands of each level, finest first, then the low band of the last level.
    """
    bands = []
    for _ in range(levels):
        video, *high = _level(video)
        bands += high
    return [*bands, video]


def wavelet_loss(a: Video, b: Video, *, levels: int) -> Float[Array, ""]:
    """Mean absolute difference in each subband, summed over the subbands.

    An error confined to one band has the same weight as in L1. L1 in the wavelet domain as a loss for video
    autoencoders: LTX-Video (arXiv:2501.00103), section on the video VAE.
    """
    # The transform is linear: one transform of the difference suffices.
    return sum((jnp.abs(band).mean() for band in haar(a - b, levels)), start=jnp.zeros(()))


def _level(video: Array) -> list[Array]:
    """All eight low/high combinations over the three axes; the all-low band is first."""
    halves = [video]
    for axis in _AXES:
        halves = list(itertools.chain.from_iterable(_split(x, axis) for x in halves))
    return halves


def _split(x: Array, axis: int) -> tuple[Array, Array]:
    if x.shape[axis] % 2:
        x = jnp.concatenate([jax.lax.slice_in_dim(x, 0, 1, axis=axis), x], axis=axis)
    first, second = (jax.lax.slice_in_dim(x, i, None, 2, axis) for i in range(2))
    return 0.5 * (first + second), 0.5 * (first - second)
