"""The three kernel bodies of attention on a GPU, in Pallas for Triton; `gpu.py` calls them.

A program computes one block of queries or of keys of one head, and visits blocks of the other side. The head
dimension is split into powers of two (96 is 64 + 32), as Triton requires, without padding. Exponentials have
base 2 with the scale folded in: `rate` is scale / log(2). Keys and queries beyond the end load as zeros; a
query beyond the end or without visible keys has an `offset` (minus its log-sum-exp in base 2) of -inf, so
that its weights are zero.
"""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from . import gpu_visits
from .masks import HIDDEN

__all__ = ["Sizes", "forward", "of_keys", "of_queries"]

_LOG_2 = 0.6931471805599453
_LOWEST = -1e30
"""Initial value of a running maximum: finite, so that the difference of two is never NaN."""

Refs = dict[str, Any]
"""Inputs by name; `codes`, `low`, `high` exist with key ranges, `order`, `counts` with any mask."""


class Sizes(NamedTuple):
    """Compile-time constants of a program.

    Attributes:
      queries, keys: tokens of the sequences.
      query_block, key_block: tokens per block.
      rate: scale / log(2).
      compiled: True on a GPU, False if interpreted.
    """

    queries: int
    keys: int
    query_block: int
    key_block: int
    rate: float
    compiled: bool


def forward(refs: Refs, output_ref: Any, log_sum_exp_ref: Any, *, sizes: Sizes) -> None:
    """Writes output and log-sum-exp of a block of queries, by the online softmax (arXiv 2205.14135)."""
    start = pl.program_id(0) * sizes.query_block
    query = _rows(refs["query"], start, sizes.query_block, sizes.queries)
    limits = _limits(refs, start, sizes)

    def step(block: Array | int, carry: Any, masked: bool) -> Any:
        sums, total, largest = carry
        first = block * sizes.key_block
        keys = _rows(refs["key"], first, sizes.key_block, sizes.keys, masked)
        scores = _product(query, keys, sizes)
        if masked:
            scores = jnp.where(_visible(refs, limits, first, sizes), scores, -jnp.inf)
        new = jnp.maximum(largest, scores.max(axis=1))
        weights = _exp2(scores, -(new * sizes.rate)[:, None], sizes)
        shrink = jnp.exp2((largest - new) * sizes.rate)
        values = _rows(refs["value"], first, sizes.key_block, sizes.keys, masked)
        sums = [x * shrink[:, None] for x in sums]
        sums = _add_product(sums, weights.astype(values[0].dtype), values, sizes)
        return sums, total * shrink + weights.sum(axis=1), new

    carry = (
        [jnp.zeros(x.shape, jnp.float32) for x in query],
        jnp.zeros(sizes.query_block, jnp.float32),
        jnp.full(sizes.query_block, _LOWEST, jnp.float32),
    )
    whole, blocks = sizes.keys // sizes.key_block, pl.cdiv(sizes.keys, sizes.key_block)
    sums, total, largest = gpu_visits.run(step, carry, refs, whole, blocks)
    sees_any = total > 0
    safe = jnp.where(sees_any, total, 1.0)
    inside = start + jnp.arange(sizes.query_block) < sizes.queries
    log_sum_exp = jnp.where(sees_any, largest * sizes.rate * _LOG_2 + jnp.log(safe), -jnp.inf)
    triton.store(log_sum_exp_ref, log_sum_exp, mask=inside)
    _store(output_ref, [x / safe[:, None] for x in sums], inside)


def of_queries(refs: Refs, d_query_ref: Any, *, sizes: Sizes) -> None:
    """Writes the gradient of a block of queries; `mean` is the weighted mean of the weights' cotangents."""
    start = pl.program_id(0) * sizes.query_block
    query, cotangent = (
        _rows(refs[name], start, sizes.query_block, sizes.queries) for name in ("query", "cotangent")
    )
    offset = _numbers(refs["offset"], start, sizes.query_block, sizes.queries, -jnp.inf)[:, None]
    mean = _numbers(refs["mean"], start, sizes.query_block, sizes.queries, 0.0)[:, None]
    limits = _limits(refs, start, sizes)

    def step(block: Array | int, sums: list[Array], masked: bool) -> list[Array]:
        first = block * sizes.key_block
        keys = _rows(refs["key"], first, sizes.key_block, sizes.keys, masked)
        weights = _exp2(_product(query, keys, sizes), offset, sizes)
        if masked:
            weights = jnp.where(_visible(refs, limits, first, sizes), weights, 0.0)
        values = _rows(refs["value"], first, sizes.key_block, sizes.keys, masked)
        d_scores = (weights * (_product(cotangent, values, sizes) - mean)).astype(keys[0].dtype)
        return _add_product(sums, d_scores, keys, sizes)

    sums = [jnp.zeros(x.shape, jnp.float32) for x in query]
    whole, blocks = sizes.keys // sizes.key_block, pl.cdiv(sizes.keys, sizes.key_block)
    sums = gpu_visits.run(step, sums, refs, whole, blocks)
    inside = start + jnp.arange(sizes.query_block) < sizes.queries
    _store(d_query_ref, [x * (sizes.rate * _LOG_2) for x in sums], inside)


def of_keys(refs: Refs, d_key_ref: Any, d_value_ref: Any, *, sizes: Sizes) -> None:
    """Writes the gradients of a block of keys and its values; scores are transposed, keys by queries."""
    start = pl.program_id(0) * sizes.key_block
    keys, values = (_rows(refs[name], start, sizes.key_block, sizes.keys) for name in ("key", "value"))
    codes = _codes(refs, start, sizes)[:, None] if "codes" in refs else None

    def step(block: Array | int, carry: Any, masked: bool) -> Any:
        d_keys, d_values = carry
        first = block * sizes.query_block
        query = _rows(refs["query"], first, sizes.query_block, sizes.queries, masked)
        offset = _numbers(refs["offset"], first, sizes.query_block, sizes.queries, -jnp.inf, masked)
        weights = _exp2(_product(keys, query, sizes), offset[None], sizes)
        # Keys beyond the end need no mask: they only affect their own gradients, which are not stored.
        if masked and codes is not None:
            low, high = _limits(refs, first, sizes)
            weights = jnp.where((low[None] <= codes) & (codes <= high[None]), weights, 0.0)
        cotangent = _rows(refs["cotangent"], first, sizes.query_block, sizes.queries, masked)
        d_values = _add_product(d_values, weights.astype(cotangent[0].dtype), cotangent, sizes)
        mean = _numbers(refs["mean"], first, sizes.query_block, sizes.queries, 0.0, masked)
        d_scores = (weights * (_product(values, cotangent, sizes) - mean[None])).astype(query[0].dtype)
        return _add_product(d_keys, d_scores, query, sizes), d_values

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in keys]
    whole, blocks = sizes.queries // sizes.query_block, pl.cdiv(sizes.queries, sizes.query_block)
    d_keys, d_values = gpu_visits.run(step, (zeros, zeros), refs, whole, blocks)
    inside = start + jnp.arange(sizes.key_block) < sizes.keys
    _store(d_key_ref, [x * (sizes.rate * _LOG_2) for x in d_keys], inside)
    _store(d_value_ref, d_values, inside)


def _parts(head: int) -> list[Any]:
    """Slices of the head dimension with power-of-two sizes, largest first."""
    sizes = [1 << bit for bit in reversed(range(head.bit_length())) if head >> bit & 1]
    return [pl.ds(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _rows(ref: Any, start: Array | int, size: int, limit: int, ragged: bool = True) -> list[Array]:
    """`size` tokens from `start`, split by `_parts`; zeros from token `limit` on, masked if `ragged`."""
    options: dict[str, Any] = {}
    if ragged and limit % size:
        options = {"mask": (start + jnp.arange(size) < limit)[:, None], "other": 0.0}
    return [triton.load(ref.at[pl.ds(start, size), part], **options) for part in _parts(ref.shape[-1])]


def _numbers(
    ref: Any, start: Array | int, size: int, limit: int, other: float | int, ragged: bool = True
) -> Array:
    """One number per token, for `size` tokens from `start`; `other` from `limit` on, masked if `ragged`."""
    options: dict[str, Any] = {}
    if ragged and limit % size:
        options = {"mask": start + jnp.arange(size) < limit, "other": other}
    return triton.load(ref.at[pl.ds(start, size)], **options)


def _store(ref: Any, parts: list[Array], inside: Array) -> None:
    for part, x in zip(_parts(ref.shape[-1]), parts, strict=True):
        triton.store(ref.at[:, part], x.astype(ref.dtype), mask=inside[:, None])


def _limits(refs: Refs, start: Array | int, sizes: Sizes) -> tuple[Array, ...]:
    """The least and largest code that each query sees; empty without key ranges."""
    if "codes" not in refs:
        return ()
    low = _numbers(refs["low"], start, sizes.query_block, sizes.queries, 0)
    return low, _numbers(refs["high"], start, sizes.query_block, sizes.queries, HIDDEN)


def _codes(refs: Refs, start: Array | int, sizes: Sizes) -> Array:
    return _numbers(refs["codes"], start, sizes.key_block, sizes.keys, HIDDEN)


def _visible(refs: Refs, limits: tuple[Array, ...], first: Array | int, sizes: Sizes) -> Array:
    """The mask of a block of keys from `first`: queries by keys, or one row for all queries."""
    if not limits:
        return (first + jnp.arange(sizes.key_block) < sizes.keys)[None]
    low, high = limits
    codes = _codes(refs, first, sizes)[None]
    return (low[:, None] <= codes) & (codes <= high[:, None])


def _product(left: list[Array], right: list[Array], sizes: Sizes) -> Array:
    """Dot products of each row of `left` with each row of `right`, summed over the parts."""
    first, *others = (_dot(x, y, 1, 1, sizes) for x, y in zip(left, right, strict=True))
    return sum(others, first)


def _add_product(sums: list[Array], left: Array, right: list[Array], sizes: Sizes) -> list[Array]:
    return [x + _dot(left, y, 1, 0, sizes) for x, y in zip(sums, right, strict=True)]


def _dot(left: Array, right: Array, left_axis: int, right_axis: int, sizes: Sizes) -> Array:
    """A product accumulated in float32; float32 inputs take three passes, with an error of 2**-22."""
    precision = None
    if left.dtype == jnp.float32:
        three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = three if sizes.compiled else jax.lax.Precision.HIGHEST
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _exp2(scores: Array, offsets: Array, sizes: Sizes) -> Array:
    """2 ** (rate * scores + offsets), with an error of 2**-22.

    Inline assembly because XLA neither fuses the multiply-add nor flushes denormals: it would take seven
    instructions for these two.
    """
    offsets = jnp.broadcast_to(offsets, scores.shape)
    if not sizes.compiled:
        return jnp.exp2(scores * sizes.rate + offsets)
    rate = struct.pack(">f", sizes.rate).hex()
    (weights,) = triton.elementwise_inline_asm(
        f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{rate}, $2; ex2.approx.ftz.f32 $0, x; }}",
        args=[scores, offsets],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
    )
    return weights
