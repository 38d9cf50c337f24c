"""3D convolution: one function, the formulation chosen per platform, height and width cut over the mesh."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Float
from vidgen.parallel.rules import constrain, partition_spec

Padding = Sequence[tuple[int, int]]
"""Zeros before and after, along time, height and width."""

_AXES = ("batch", "time", "height", "width", None)


def conv3d(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kt kh kw c o"],
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0), (0, 0)),
) -> Float[Array, "b t2 h2 w2 o"]:
    """Cross-correlation over time, height and width with zero padding.

    The result is in the dtype of `x`. XLA's native 3D convolution is used everywhere but on CPU, where it is
    several times slower than the 2D one; there the taps over time become channels of one 2D convolution, or,
    where there are many pixels, a few rows at a time become a matrix product.

    On a mesh, each device filters its part of the height and width, and neighbours exchange the rows and
    columns that the filter reaches over: the result is that of one device.
    """
    # Gathered whole before it is used: left to itself the partitioner makes one convolution per shard of
    # `fsdp`, each over a few of the input channels.
    kernel = constrain(kernel.astype(x.dtype), None, None, None, None, "conv_out")
    if jax.sharding.get_abstract_mesh().empty:
        return _on_one_device(x, kernel, strides, padding)
    spec = _cut(x.shape, kernel.shape, strides, padding)
    if spec[2] is None and spec[3] is None:
        return _on_one_device(constrain(x, "batch", None, None, None, None), kernel, strides, padding)
    local = functools.partial(_with_neighbours, spec=spec, strides=strides, padding=padding)
    return jax.shard_map(local, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, kernel)


def _cut(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int, int], padding: Padding
) -> PartitionSpec:
    """How `x` is laid over the mesh in context: along sides of which every device makes an equal part."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = list(partition_spec(_AXES, shape, mesh))
    for dim in (2, 3):
        if spec[dim] is None:
            continue
        part, stride, pad = shape[dim] // mesh.shape[spec[dim]], strides[dim - 1], padding[dim - 1]
        keeps_size = (shape[dim] + sum(pad) - kernel[dim - 1]) // stride + 1 == shape[dim] // stride
        if part % stride or part < max(pad) or not keeps_size:
            spec[dim] = None
    return PartitionSpec(*spec)


def _with_neighbours(
    x: Array, kernel: Array, *, spec: PartitionSpec, strides: tuple[int, int, int], padding: Padding
) -> Array:
    """The convolution of one device's part: what others hold of its surroundings takes the padding's place.

    It is written out since the partitioner's own (jax 0.10) gives wrong gradients of the kernel, without a
    word, where a mesh axis is left over: it sums over copies too.
    """
    padding_left = list(padding)
    for dim in (2, 3):
        axis = spec[dim]
        if axis is not None:
            x = _extended(x, dim, axis, *padding[dim - 1])
            padding_left[dim - 1] = (0, 0)
    return _on_one_device(x, kernel, strides, padding_left)


def _extended(x: Array, dim: int, axis: str, before: int, after: int) -> Array:
    """`x` between the last `before` rows of the device before and the first `after` rows of the one after.

    At the ends of the mesh axis there is nothing to receive, which is zeros: the padding.
    """
    count, size = jax.lax.axis_size(axis), x.shape[dim]
    forward = [(i, i + 1) for i in range(count - 1)]
    parts = [x]
    if before:
        last = jax.lax.slice_in_dim(x, size - before, size, axis=dim)
        parts.insert(0, jax.lax.ppermute(last, axis, forward))
    if after:
        first = jax.lax.slice_in_dim(x, 0, after, axis=dim)
        parts.append(jax.lax.ppermute(first, axis, [(j, i) for i, j in forward]))
    return jnp.concatenate(parts, axis=dim)


def _on_one_device(x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding) -> Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: _on_cpu(x, k, strides, padding),
        default=lambda x, k: _native(x, k, strides, padding),
    )


def _on_cpu(x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding) -> Array:
    """Of two formulations the faster one (`benchmarks/convolution.py`)."""
    height, width, channels = x.shape[2:]
    # With more channels a block does not stay in cache, with few pixels there is nothing to gain.
    whole = strides == (1, 1, 1) and kernel.shape[:3] == (3, 3, 3)
    if whole and 32 <= channels <= 256 and height * width >= 4096:
        return _by_rows(x, kernel, tuple(map(tuple, padding)))
    return _time_taps_as_channels(x, kernel, strides, padding)


_BLOCK = 256
"""Pixels whose neighbours are laid side by side at a time."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_rows(x: Array, kernel: Array, padding: Padding) -> Array:
    """A matrix product per few rows of a frame, with all neighbours of each pixel side by side."""
    taps, kernel_height, kernel_width, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, frames = x.shape[0], x.shape[1] - taps + 1
    height, width = x.shape[2] - kernel_height + 1, x.shape[3] - kernel_width + 1
    rows = next(count for count in range(max(1, _BLOCK // width), 0, -1) if height % count == 0)
    matrix = kernel.reshape(-1, features)

    def block(index: Array) -> Array:
        frame, row = index // (height // rows), index % (height // rows) * rows
        start = (frame // frames, frame % frames, row, 0, 0)
        around = jax.lax.dynamic_slice(x, start, (1, taps, rows + kernel_height - 1, *x.shape[3:]))[0]
        columns = [
            around[t, h : h + rows, w : w + width]
            for t in range(taps)
            for h in range(kernel_height)
            for w in range(kernel_width)
        ]
        return jnp.concatenate(columns, axis=-1).reshape(rows * width, -1) @ matrix

    blocks = jax.lax.map(block, jnp.arange(batch * frames * (height // rows)))
    return blocks.reshape(batch, frames, height, width, features)


def _by_rows_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _by_rows(x, kernel, padding), (x, kernel)


def _by_rows_backward(padding: Padding, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, ...]:
    convolve = functools.partial(_time_taps_as_channels, strides=(1, 1, 1), padding=padding)
    return jax.vjp(convolve, *saved)[1](gradient)


_by_rows.defvjp(_by_rows_forward, _by_rows_backward)


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
