"""3D convolution, formulated per platform, with height and width sharded over the mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Float
from vidgen.ops import convolution_cpu
from vidgen.ops.convolution_cpu import Padding
from vidgen.parallel.rules import constrain, partition_spec

_AXES = ("batch", "time", "height", "width", None)


def conv3d(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kt kh kw c o"],
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0), (0, 0)),
) -> Float[Array, "b t2 h2 w2 o"]:
    """Cross-correlation over time, height and width with zero padding.

    The result has the dtype of `x`. Uses XLA's native 3D convolution except on CPUs, where it is several
    times slower than the 2D one (`vidgen.ops.convolution_cpu`).

    On a mesh, each device filters its shard of height and width after a halo exchange with its neighbours
    (the image rows and columns that the filter reaches); the result equals that of one device.
    """
    local = functools.partial(_on_one_device, strides=strides)
    return _over_mesh(local, x, kernel.astype(x.dtype), strides, padding)


def upsampled_conv3d(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "kt 3 3 c o"]
) -> Float[Array, "b t2 h2 w2 o"]:
    """`conv3d` of `x` upsampled 2 x 2 (nearest), with one pixel of zero padding in height and width.

    Works on the pixels before upsampling, with the weights that meet copies of the same pixel summed first:
    fewer multiply-adds, and no array of the larger size except the result.
    """
    return _over_mesh(_upsampled_on_one_device, x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)))


def _over_mesh(
    local: Callable[..., Array], x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding
) -> Array:
    """`local(x, kernel, padding=padding)`, run per device on its shard if there is a mesh."""
    # All-gathered before use: otherwise the partitioner makes one convolution per shard of `fsdp`, each over
    # a few of the input channels.
    kernel = constrain(kernel, None, None, None, None, "conv_out")
    if jax.sharding.get_abstract_mesh().empty:
        return local(x, kernel, padding=padding)
    spec = _shardable_spec(x.shape, kernel.shape, strides, padding)
    if spec[2] is None and spec[3] is None:
        return local(constrain(x, "batch", None, None, None, None), kernel, padding=padding)
    surrounded = functools.partial(_with_neighbours, local, spec=spec, padding=padding)
    return jax.shard_map(surrounded, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, kernel)


def _shardable_spec(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int, int], padding: Padding
) -> PartitionSpec:
    """How `x` is sharded over the mesh in context: a side only if each device makes an equal part of it."""
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
    local: Callable[..., Array], x: Array, kernel: Array, *, spec: PartitionSpec, padding: Padding
) -> Array:
    """One device's shard of the result: the neighbours' halo replaces the padding.

    Explicit because the partitioner's halo exchange (jax 0.10) silently gives wrong kernel gradients if `x`
    is replicated over a mesh axis: it sums over the replicas too.
    """
    remaining_padding = list(padding)
    for dim in (2, 3):
        axis = spec[dim]
        if axis is not None:
            x = _extended(x, dim, axis, *padding[dim - 1])
            remaining_padding[dim - 1] = (0, 0)
    return local(x, kernel, padding=remaining_padding)


def _extended(x: Array, dim: int, axis: str, before: int, after: int) -> Array:
    """`x` with a halo along `dim`: the previous device's last `before` slices, the next one's first `after`.

    At the ends of the mesh axis `ppermute` receives zeros, which are the padding.
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


def _on_one_device(x: Array, kernel: Array, *, strides: tuple[int, int, int], padding: Padding) -> Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: convolution_cpu.convolve(x, k, strides, padding),
        default=lambda x, k: _native(x, k, strides, padding),
    )


_SPREAD = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], np.float32)
"""Maps a 3-tap filter over repeated pixels to a 4-tap filter over pixels with zeros in between."""


def _upsampled_on_one_device(x: Array, kernel: Array, *, padding: Padding) -> Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: convolution_cpu.convolve_upsampled(x, k, padding),
        default=lambda x, k: _dilated(x, k, padding),
    )


def _dilated(x: Array, kernel: Array, padding: Padding) -> Array:
    time, *space = padding
    kernel = jnp.einsum("ph,qw,thwco->tpqco", _SPREAD, _SPREAD, kernel).astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1, 1),
        (time, *((2 * before, 2 * after) for before, after in space)),
        lhs_dilation=(1, 2, 2),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _native(x: Array, kernel: Array, strides: tuple[int, int, int], padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
