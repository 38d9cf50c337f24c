"""The kernel as a differentiable function: what is supported, sizes of blocks, and the gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from . import tpu
from .rotation import LANES, Rotation, rotation

__all__ = ["block_rows", "norm_rope"]

BLOCK_BYTES = 5120 * 128 * 2
"""Of a block of `x`; the backward pass has ten times as much in VMEM, of 16 MiB that a kernel gets on v5e."""
MOST_ROWS = 256
"""Of a block; with 384, cycles are 2 to 9 % fewer where they are hidden behind the memory anyhow."""


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

    One TPU kernel each way; what is computed is float32, and rounded once. Saved for the backward pass are
    the arguments alone. XLA does not partition a kernel: on a mesh, call it in `shard_map`, clips or tokens
    cut, with all channels of a token on one device.

    Args:
      x: queries or keys, bfloat16 or float32, `b s (n k)` or `b s n k`; the first is how a projection leaves
        them, and needs no copy.
      weight: of the norm, `(n k)`.
      angles: `#b s k2`, one per pair of a head, or better, the table that `rotation` makes of them once for
        all layers. They get no gradient.
      eps: added to the mean square; a Python number.
      scale: multiplies the result before it is rounded, so that the scale of attention costs nothing; a
        Python number.
      rows: tokens per block, a multiple of 16; None chooses.
      interpret: runs the kernel on any backend, slowly, for tests.

    Returns:
      Of the shape and dtype of `x`.

    Raises:
      NotImplementedError: the dtype, the size of a head or the number of channels is one the kernel does not
        take; the reference takes all.
      ValueError: shapes do not fit each other.
    """
    turns = angles if isinstance(angles, Rotation) else rotation(angles)
    flat = x.reshape(*x.shape[:2], -1)
    _check(flat, weight, turns)
    if x.ndim == 4 and x.shape[-1] != turns.head_dim:
        raise ValueError(f"heads of {x.shape[-1]} channels, and angles for {turns.head_dim}")
    options = tpu.Options(
        head_dim=turns.head_dim, eps=eps, scale=scale, rows=rows or block_rows(flat), interpret=interpret
    )
    table = jax.lax.stop_gradient(turns.table)
    result: Array = _norm_rope(flat, _varying(weight, flat), _varying(table, flat), options)
    return result.reshape(x.shape)


def block_rows(x: Array | jax.ShapeDtypeStruct) -> int:
    """How many tokens of `x`, `b s (n k)`, a block has if nobody says."""
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
    """Within `shard_map`, over the mesh axes that `like` varies over; so its gradient is summed over them."""
    own, wanted = (jax.typeof(array).manual_axis_type.varying for array in (x, like))
    axes = tuple(sorted(wanted - own))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _check(x: Array, weight: Array, turns: Rotation) -> None:
    batch, length, width = x.shape
    head_dim, table = turns.head_dim, turns.table
    if weight.shape != (width,) or width % head_dim:
        raise ValueError(f"{width} channels, a weight of {weight.shape}, heads of {head_dim}")
    if table.shape[0] not in (1, batch) or table.shape[1] != length:
        raise ValueError(f"angles of {table.shape[:2]} clips and tokens, for {(batch, length)}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {x.dtype}")
    if head_dim > 2 * LANES or width % LANES:
        raise NotImplementedError(
            f"{width} channels, heads of {head_dim}: the kernel takes multiples of {LANES} channels, "
            f"and heads of at most {2 * LANES}"
        )
