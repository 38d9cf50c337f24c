"""The TPU kernels, forward and backward, each one pass over blocks of tokens.

A block of tokens with all channels is in VMEM, and columns of `LANES` channels are processed one after the
other, so that no head size needs a transpose. The kernels are memory-bound: each number is read once and
written once. There is no loop over the tokens of a block, because each iteration would wait for reductions
over lanes and for lane shuffles: unrolled, the compiler overlaps the work of all tokens.

The partner of each number in its pair comes from one lane shuffle per two rows of bfloat16. Two rotations by
one lane and a select take longer, and a product with a permutation matrix is no faster.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rotation import LANES

__all__ = ["ROW_TILE", "Interpret", "Options", "backward", "forward"]

ROW_TILE = 16
"""Rows of a bfloat16 tile; the number of tokens in a block is a multiple of it."""

Interpret = bool | pltpu.InterpretParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compile-time constants of a kernel.

    Attributes:
      head_dim, eps, scale: as in `vjp.norm_rope`.
      rows: tokens per block, a multiple of `ROW_TILE`.
      interpret: interprets the kernel, on any backend.
    """

    head_dim: int
    eps: float
    scale: float
    rows: int
    interpret: Interpret = False


def forward(x: Array, weight: Array, table: Array, options: Options) -> Array:
    """RMS norm and RoPE of `x`, `b s d`; `weight` is float32, `table` is `Rotation.table`."""
    grid, tokens, shared, angles = _blocks(x, table, options.rows)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=grid,
        in_specs=[tokens, shared, angles],
        out_specs=tokens,
        out_shape=_like(x, x.shape, x.dtype),
        compiler_params=_parallel(),
        cost_estimate=_cost(x, table, arrays=2, operations=12),
        interpret=options.interpret,
        name="norm_rope",
    )(x, weight[None], table)


def backward(
    x: Array, weight: Array, table: Array, cotangent: Array, options: Options
) -> tuple[Array, Array]:
    """Gradients of `x`, in its dtype, and of `weight`, float32; `cotangent` is `b s d`."""
    grid, tokens, shared, angles = _blocks(x, table, options.rows)
    _, length, width = x.shape
    dx, dweights = pl.pallas_call(
        functools.partial(_backward_kernel, options=options, length=length),
        grid=grid,
        in_specs=[tokens, shared, angles, tokens],
        # One partial weight gradient per block, so that blocks are independent.
        out_specs=[tokens, pl.BlockSpec((None, None, 1, width), lambda i, b: (i, b, 0, 0))],
        out_shape=[_like(x, x.shape, x.dtype), _like(x, (*grid, 1, width), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((options.rows, width), jnp.float32)],
        compiler_params=_parallel(),
        cost_estimate=_cost(x, table, arrays=3, operations=25),
        interpret=options.interpret,
        name="norm_rope_backward",
    )(x, weight[None], table, cotangent)
    return dx, dweights.sum((0, 1, 2))


def _like(x: Array, shape: tuple[int, ...], dtype: jnp.dtype | type) -> jax.ShapeDtypeStruct:
    """Output shape and dtype with the manual mesh axes of `x`, for use inside `shard_map`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _blocks(
    x: Array, table: Array, rows: int
) -> tuple[tuple[int, int], pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """The grid, and the block specs of tokens, weight and table."""
    batch, length, width = x.shape
    each = int(table.shape[0] > 1)
    # Clips are the inner grid axis, so that a table shared by all clips is read once.
    grid = (pl.cdiv(length, rows), batch)
    tokens = pl.BlockSpec((None, rows, width), lambda i, b: (b, i, 0))
    shared = pl.BlockSpec((1, width), lambda i, b: (0, 0))
    angles = pl.BlockSpec((None, rows, table.shape[-1]), lambda i, b: (b * each, i, 0))
    return grid, tokens, shared, angles


def _parallel() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))


def _cost(x: Array, table: Array, *, arrays: int, operations: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=operations * x.size,
        transcendentals=x.size // x.shape[-1],
        bytes_accessed=arrays * x.nbytes + table.nbytes + 4 * x.shape[-1],
    )


def _forward_kernel(x_ref, weight_ref, table_ref, out_ref, *, options: Options):
    inverse = _inverse_rms(x_ref, options.eps) * options.scale
    turns = [(cos * inverse, sin * inverse) for cos, sin in _turns(table_ref, options.head_dim)]
    for index, column in enumerate(_columns(x_ref.shape[-1])):
        cos, sin = turns[index % len(turns)]
        x, weight = x_ref[:, column], weight_ref[:, column]
        across = _partners(jnp.broadcast_to(weight, (8, LANES)))[:1]  # Lane shuffles need full registers.
        result = x.astype(jnp.float32) * weight * cos + _partners(x) * across * sin
        out_ref[:, column] = result.astype(out_ref.dtype)


def _backward_kernel(
    x_ref,
    weight_ref,
    table_ref,
    cotangent_ref,
    dx_ref,
    dweight_ref,
    scaled_ref,
    *,
    options: Options,
    length: int,
):
    """With y = x / rms(x): dweight = sum of dy * y, and dx = (dy w - y mean(dy w y)) / rms(x)."""
    rows, width = x_ref.shape
    inverse = _inverse_rms(x_ref, options.eps)
    back = inverse * options.scale
    turns = [(cos * back, sin * back) for cos, sin in _turns(table_ref, options.head_dim)]
    beyond = None
    if length % rows:  # Reads beyond the last token are undefined, e.g. NaN.
        row = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        beyond = row >= length
    product = jnp.zeros((rows, LANES), jnp.float32)
    for index, column in enumerate(_columns(width)):
        cos, sin = turns[index % len(turns)]
        cotangent, weight = cotangent_ref[:, column], weight_ref[:, column]
        turned = cotangent.astype(jnp.float32) * cos - _partners(cotangent) * sin
        share = turned * x_ref[:, column].astype(jnp.float32)
        if beyond is not None:
            share = jnp.where(beyond, 0.0, share)
        dweight_ref[:, column] = share.sum(0, keepdims=True)
        product += share * weight
        scaled_ref[:, column] = turned * weight
    along = inverse * inverse * (product.sum(-1, keepdims=True) / width)
    for column in _columns(width):
        dx = scaled_ref[:, column] - x_ref[:, column].astype(jnp.float32) * along
        dx_ref[:, column] = dx.astype(dx_ref.dtype)


def _columns(width: int) -> list[slice]:
    return [slice(start, start + LANES) for start in range(0, width, LANES)]


def _inverse_rms(x_ref, eps: float) -> Array:
    """1 / RMS of each token, `r 1`."""
    rows, width = x_ref.shape
    squares = jnp.zeros((rows, LANES), jnp.float32)
    for column in _columns(width):
        squares += jnp.square(x_ref[:, column].astype(jnp.float32))
    return jax.lax.rsqrt(squares.sum(-1, keepdims=True) / width + eps)


def _turns(table_ref, head_dim: int) -> list[tuple[Array, Array]]:
    """Cosine and sine per lane, `r LANES`, for each column of one period of heads over columns.

    The sine is negative in the first lane of a pair, where the partner's term is subtracted.
    """
    rows, width = table_ref.shape
    cos, sin = table_ref[:, :LANES], table_ref[:, width - LANES :]
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    turns = []
    for column in range(head_dim // math.gcd(head_dim, LANES)):
        pair = (lane + column * LANES) % head_dim // 2
        sines = _take(sin, pair + (width // 2) % LANES)
        turns.append((_take(cos, pair), jnp.where(lane % 2 == 0, -sines, sines)))
    return turns


def _partners(x: Array) -> Array:
    """The other number of each pair, float32; two rows of bfloat16 are shuffled as one 32-bit row."""
    packed = pltpu.bitcast(x, jnp.int32) if x.dtype == jnp.bfloat16 else x
    lane = jax.lax.broadcasted_iota(jnp.int32, packed.shape, 1)
    moved = _take(packed, lane ^ 1)
    return (pltpu.bitcast(moved, x.dtype) if x.dtype == jnp.bfloat16 else moved).astype(jnp.float32)


def _take(x: Array, lanes: Array) -> Array:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")
