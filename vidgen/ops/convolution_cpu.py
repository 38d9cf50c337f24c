"""3D convolution on CPUs: by XLA's 2D convolution, faster than its 3D one; Winograd for large inputs."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.typing import Array, Float

Padding = Sequence[tuple[int, int]]
"""Numbers of zeros before and after, along time, height and width."""

_MIN_CHANNELS = 32
_MIN_SIZE = 2**17
"""Least input elements for Winograd: below, its additions cost more than the multiplications it saves."""
_MANY_CHANNELS = 192
"""Least channels for Winograd along height as well as time."""


def convolve(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kt kh kw c o"],
    strides: tuple[int, int, int],
    padding: Padding,
) -> Float[Array, "b t2 h2 w2 o"]:
    """`vidgen.ops.convolution.conv3d` on one CPU device (measured by `benchmarks/convolution.py`).

    Large float32 inputs use Winograd's algorithm over time, four frames at a time with half of the
    multiply-adds, and with many channels over height too. Its rounding errors are about three times those of
    direct convolution.
    """
    channels = min(kernel.shape[-2:])
    large = x.size >= _MIN_SIZE and channels >= _MIN_CHANNELS
    if strides != (1, 1, 1) or not large or x.dtype != jnp.float32:
        return _time_taps_as_channels(_padded(x, padding[:1]), kernel, strides, padding[1:])
    if channels < _MANY_CHANNELS:
        return _winograd(_padded(x, padding[:1]), kernel, (1,), padding[1:])
    return _winograd(_padded(x, padding[:2]), kernel, (1, 2), ((0, 0), padding[2]))


_ADDED = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""Which of three weights meet which of two neighbouring pixels, for a pixel's first and second copy."""


def convolve_upsampled(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "kt 3 3 c o"], padding: Padding
) -> Float[Array, "b t2 h2 w2 o"]:
    """`vidgen.ops.convolution.upsampled_conv3d` on one CPU device, with 4/9 of the multiply-adds.

    Args:
      padding: zeros, in pixels before upsampling: one per side, or none on a side with a neighbour's halo.
    """
    x, features = _padded(x, padding), kernel.shape[-1]
    kernel = jnp.einsum("iph,jqw,thwco->tpqcijo", _ADDED, _ADDED, kernel).astype(x.dtype)
    # Each corner between four pixels gives four outputs: the copy nearest to it of each of the four.
    y = convolve(x, kernel.reshape(*kernel.shape[:4], -1), (1, 1, 1), ((0, 0),) * 3)
    batch, frames, height, width = y.shape[:4]
    y = y.reshape(batch, frames, height, width, 2, 2, features)
    rows = [
        jnp.stack([y[:, :, i : height - 1 + i, j : width - 1 + j, i, j] for j in range(2)], axis=4)
        for i in range(2)
    ]
    return jnp.stack(rows, axis=3).reshape(batch, frames, 2 * height - 2, 2 * width - 2, features)


def _padded(x: Array, padding: Padding) -> Array:
    """`x` with zero padding of the first dimensions after the batch."""
    return jnp.pad(x, ((0, 0), *padding, *[(0, 0)] * (x.ndim - 1 - len(padding))))


def _time_taps_as_channels(x: Array, kernel: Array, strides: tuple[int, int, int], space: Padding) -> Array:
    """One 2D convolution over all frames, with the frames that the filter spans stacked as channels."""
    taps, height, width, channels, features = kernel.shape
    batch, frames, *_ = x.shape
    out_frames = (frames - taps) // strides[0] + 1
    last = (out_frames - 1) * strides[0] + 1
    stacked = jnp.concatenate([x[:, i : i + last : strides[0]] for i in range(taps)], axis=-1)
    out = jax.lax.conv_general_dilated(
        stacked.reshape(batch * out_frames, *x.shape[2:4], taps * channels),
        kernel.transpose(1, 2, 0, 3, 4).reshape(height, width, taps * channels, features),
        strides[1:],
        space,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(batch, out_frames, *out.shape[1:])


def _winograd(x: Array, kernel: Array, dims: tuple[int, ...], space: Padding) -> Array:
    """Winograd along each of `dims` with three taps: 4 outputs at a time (time axis only), then 2."""
    if not dims:
        return _time_taps_as_channels(x, kernel, (1, 1, 1), space)
    dim, *others = dims
    rest = tuple(others)
    if kernel.shape[dim - 1] != 3:
        return _winograd(x, kernel, rest, space)
    outputs = x.shape[dim] - 2
    parts, start = [], 0
    for size in (4, 2) if dim == 1 else (2,):
        count = (outputs - start) // size
        if count:
            part = jax.lax.slice_in_dim(x, start, start + count * size + 2, axis=dim)
            parts.append(_by_groups(part, kernel, dim, size, rest, space))
            start += count * size
    if start < outputs:
        parts.append(_winograd(jax.lax.slice_in_dim(x, start, None, axis=dim), kernel, rest, space))
    return jnp.concatenate(parts, axis=dim)


def _by_groups(x: Array, kernel: Array, dim: int, size: int, rest: tuple[int, ...], space: Padding) -> Array:
    """`size` outputs of a 3-tap filter from `size + 2` products instead of `3 * size` (arXiv 1509.09308)."""
    of_inputs, of_filters, of_products = _transforms(size)
    last = x.shape[dim] - size - 1
    inputs = [jax.lax.slice_in_dim(x, i, i + last, size, axis=dim) for i in range(size + 2)]
    taps = [jax.lax.slice_in_dim(kernel, i, i + 1, axis=dim - 1) for i in range(3)]
    pairs = zip(_mixed(of_inputs, inputs), _mixed(of_filters, taps), strict=True)
    outputs = _mixed(of_products, [_winograd(a, b, rest, space) for a, b in pairs])
    y = jnp.stack(outputs, axis=dim + 1)
    return y.reshape(*y.shape[:dim], -1, *y.shape[dim + 2 :])


@functools.cache
def _transforms(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Toom-Cook matrices for inputs, filters and products, for `size` outputs of a 3-tap filter.

    The points are chosen for small rounding errors (Barabasz et al., arXiv 1803.10986).
    """
    points = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 0.5, -2.0)}[size]
    powers = np.vander(points, size + 2, increasing=True)
    scale = [np.prod([p - q for q in points if q != p]) for p in points]
    inputs = np.zeros((size + 2, size + 2))
    for row, point in enumerate(points):
        inputs[row, :-1] = np.polynomial.polynomial.polyfromroots([q for q in points if q != point])
    inputs[-1] = np.polynomial.polynomial.polyfromroots(points)
    filters = np.vstack([powers[:, :3] / np.array(scale)[:, None], np.eye(3)[2]])
    products = np.vstack([powers[:, :size], np.eye(size)[-1]]).T
    return inputs, filters, products


def _mixed(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Linear combinations of `parts`, one per row of `matrix`."""
    return [
        functools.reduce(jnp.add, [part * factor for part, factor in zip(parts, row, strict=True) if factor])
        for row in matrix.tolist()
    ]
