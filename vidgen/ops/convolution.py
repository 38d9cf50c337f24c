"""3D convolution: one function, the formulation chosen per platform."""

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array, Float
from vidgen.parallel.rules import constrain

Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def conv3d(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kt kh kw c o"],
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0), (0, 0)),
) -> Float[Array, "b t2 h2 w2 o"]:
    """Cross-correlation over time, height and width with zero padding.

    The result is in the dtype of `x`. XLA's native 3D convolution is used everywhere but on CPU, where it is
    several times slower than the 2D one; there the taps over time become channels of one 2D convolution.
    """
    # Gathered whole before it is used: left to itself the partitioner makes one convolution per shard of
    # `fsdp`, each over a few of the input channels.
    kernel = constrain(kernel.astype(x.dtype), None, None, None, None, "conv_out")
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: _time_taps_as_channels(x, k, strides, padding),
        default=lambda x, k: _native(x, k, strides, padding),
    )


def _native(x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _time_taps_as_channels(x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding) -> Array:
    taps, kernel_height, kernel_width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    batch, frames, height, width, _ = x.shape
    out_frames = (frames - taps) // strides[0] + 1
    last = (out_frames - 1) * strides[0] + 1
    stacked = jnp.concatenate([x[:, i : i + last : strides[0]] for i in range(taps)], axis=-1)
    out = jax.lax.conv_general_dilated(
        stacked.reshape(batch * out_frames, height, width, taps * channels),
        kernel.transpose(1, 2, 0, 3, 4).reshape(kernel_height, kernel_width, taps * channels, features),
        strides[1:],
        padding[1:],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(batch, out_frames, *out.shape[1:])
