"""The kernel as a differentiable function: input checks, block sizes, and the gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from . import tpu
from .rotation import LANES, Rotation, rotation

__all__ = ["block_rows", "norm_rope"]

BLOCK_BYTES = 5120 * 128 * 2
"""Most bytes of a block of `x`; the backward pass uses ten times as much of the 16 MiB of VMEM on a v5e."""
MOST_ROWS = 256
"""Most tokens of a block; 384 takes 2 to 9 % fewer cycles, but only cycles hidden by memory transfers."""


def norm_rope(
    x: Array,
    weight: Array,
    angles: Array | Rotation,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    rows: int | None = None,
    interpret: tpu.Interpret = False,
) -> Array:
    """RMS norm over all heads (arXiv 1910.07467), then rotary position embedding (arXiv 2104.09864).

    One TPU kernel for each pass; computes in float32 and rounds once. The residuals of the backward pass are
    only the arguments. XLA does not partition a kernel: on a mesh, call this inside `shard_map`, with clips
    or tokens sharded and all channels of a token on one device.

    Args:
      x: queries or keys, bfloat16 or float32, `b s (n k)` or `b s n k`; the first is the layout of a
        projection's output, and needs no copy.
      weight: weight of the norm, `(n k)`.
      angles: `#b s k2`, one per pair of a head's channels, or better, the table from `rotation`, computed
        once for all layers. They get no gradient.
      eps: added to the mean square; a Python number.
      scale: multiplies the result before it is rounded, so that attention's scale costs nothing; a Python
        number.
      rows: tokens per block, a multiple of 16; by default `block_rows`.
      interpret: interprets the kernel on any backend: slow, for tests.

    Returns:
      An array with the shape and dtype of `x`.

    Raises:
      NotImplementedError: the kernel does not support the dtype, the head size or the number of channels; the
        reference supports all.
      ValueError: shapes do not match.
    """
    rotations = angles if isinstance(angles, Rotation) else rotation(angles)
    flat = x.reshape(*x.shape[:2], -1)
    _check(flat, weight, rotations)
    if x.ndim == 4 and x.shape[-1] != rotations.head_dim:
        raise ValueError(
            f"x has heads of {x.shape[-1]} channels, and angles are for heads of {rotations.head_dim}"
        )
    options = tpu.Options(
        head_dim=rotations.head_dim, eps=eps, scale=scale, rows=rows or block_rows(flat), interpret=interpret
    )
    table = jax.lax.stop_gradient(rotations.table)
    result: Array = _norm_rope(flat, _varying(weight, flat), _varying(table, flat), options)
    return result.reshape(x.shape)


def block_rows(x: Array | jax.ShapeDtypeStruct) -> int:
    """The default number of tokens per block for `x`, `b s (n k)`."""
    _, length, width = x.shape
    tile = tpu.ROW_TILE
    fitting = BLOCK_BYTES // (width * x.dtype.itemsize)
    return max(min(fitting, MOST_ROWS, length + tile - 1) // tile * tile, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_rope(x: Array, weight: Array, table: Array, options: tpu.Options) -> Array:
    return tpu.forward(x, weight.astype(jnp.float32), table, options)


def _forward(x: Array, weight: Array, table: Array, options: tpu.Options):
    return _norm_rope(x, weight, table, options), (x, weight, table)


def _backward(options: tpu.Options, saved: tuple[Array, Array, Array], cotangent: Array):
    x, weight, table = saved
    dx, dweight = tpu.backward(x, weight.astype(jnp.float32), table, cotangent, options)
    return dx, dweight.astype(weight.dtype), None


_norm_rope.defvjp(_forward, _backward)


def _varying(x: Array, like: Array) -> Array:
    """`x` cast to vary over the manual mesh axes of `like`, so that its gradient is summed over them."""
    current, wanted = (jax.typeof(array).manual_axis_type.varying for array in (x, like))
    axes = tuple(sorted(wanted - current))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _check(x: Array, weight: Array, rotations: Rotation) -> None:
    batch, length, width = x.shape
    head_dim, table = rotations.head_dim, rotations.table
    if weight.shape != (width,) or width % head_dim:
        raise ValueError(
            f"x has {width} channels, the weight has shape {weight.shape}, heads have {head_dim} channels: "
            "expected one weight per channel, and a multiple of the head size"
        )
    if table.shape[0] not in (1, batch) or table.shape[1] != length:
        raise ValueError(
            f"angles for {table.shape[:2]} clips and tokens, and x has {(batch, length)}: expected 1 clip or "
            "as many as x, and the same number of tokens"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {x.dtype}")
    if head_dim > 2 * LANES or width % LANES:
        raise NotImplementedError(
            f"{width} channels, heads of {head_dim}: the kernel takes multiples of {LANES} channels, "
            f"and heads of at most {2 * LANES}"
        )
