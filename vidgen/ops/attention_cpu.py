"""Blockwise attention on CPUs: a few heads and a block of queries at a time keep scores in the CPU cache."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.typing import Array, Float
from vidgen.ops.key_ranges import KeyRanges

_BLOCK = 2**21
"""Most scores computed at a time: few enough to stay in the CPU cache until they are read again."""
_HIDDEN = float(np.finfo(np.float32).min)


class SoftmaxStats(NamedTuple):
    """Softmax statistics per query and head: the largest score, and the sum of exp(score - largest)."""

    max: Float[Array, "b s n"]
    sum: Float[Array, "b s n"]


def worth_blocking(query: Float[Array, "b s n k"], key: Float[Array, "b r n k"]) -> bool:
    """Whether blockwise attention is faster than all scores at a time: float32, `_BLOCK` scores or more."""
    batch, queries, heads, _ = query.shape
    return query.dtype == jnp.float32 and batch * heads * queries * key.shape[1] >= _BLOCK


def forward(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    ranges: KeyRanges | None,
    scale: float,
) -> tuple[Float[Array, "b s n k"], SoftmaxStats]:
    """Attention and the statistics for `backward`, without an array of all scores.

    A block of queries takes all keys at a time, so no partial sum needs rescaling.
    """
    plan = _Cut(query, key)

    def of_heads(inputs: Any) -> Any:
        query, key, value, codes, limits = inputs

        def of_block(inputs: Any) -> Any:
            query, limits = inputs
            scores = _masked(_products(query, key), codes, limits, _HIDDEN)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            return jnp.einsum("gsr,grk->gsk", weights, value) / total, largest, total

        return jax.lax.map(of_block, (query, limits))

    inputs = (plan.queries(scale * query), plan.keys(key), plan.keys(value), *plan.ranges(ranges))
    y, largest, total = map(plan.joined, jax.lax.map(of_heads, inputs))
    return y, SoftmaxStats(largest[..., 0], total[..., 0])


def backward(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    ranges: KeyRanges | None,
    scale: float,
    y: Float[Array, "b s n k"],
    statistics: SoftmaxStats,
    gradient: Float[Array, "b s n k"],
) -> tuple[Float[Array, "b s n k"], Float[Array, "b r n k"], Float[Array, "b r n k"]]:
    """Gradients of query, key and value, given the gradient of `y`.

    Recomputes the scores (FlashAttention-2; arXiv 2307.08691).
    """
    plan = _Cut(query, key)
    # Dividing the gradient by the softmax sum replaces dividing the weights, which are far more numbers.
    gradient = gradient / statistics.sum[..., None]
    mean = (gradient * y).sum(-1, keepdims=True)

    def of_heads(inputs: Any) -> Any:
        *blocks, key, value, codes, limits = inputs

        def of_block(sums: Any, inputs: Any) -> Any:
            query, gradient, largest, mean, limits = inputs
            scores = _masked(_products(query, key), codes, limits, _HIDDEN)
            weights = jnp.exp(scores - largest)
            d_scores = _masked(weights * (_products(gradient, value) - mean), codes, limits, 0.0)
            # Stored once: without the barrier XLA recomputes them for each use.
            weights, d_scores = jax.lax.optimization_barrier((weights, d_scores))
            d_key = sums[0] + jnp.einsum("gsk,gsr->gkr", query, d_scores)
            d_value = sums[1] + jnp.einsum("gsk,gsr->gkr", gradient, weights)
            return (d_key, d_value), jnp.einsum("gsr,grk->gsk", d_scores, key)

        zeros = jnp.zeros_like(jnp.swapaxes(key, 1, 2))
        sums, d_query = jax.lax.scan(of_block, (zeros, zeros), (*blocks, limits))
        return d_query, *(jnp.swapaxes(x, 1, 2) for x in sums)

    blocks = map(plan.queries, (scale * query, gradient, statistics.max[..., None], mean))
    inputs = (*blocks, plan.keys(key), plan.keys(value), *plan.ranges(ranges))
    d_query, d_key, d_value = jax.lax.map(of_heads, inputs)
    back = functools.partial(_heads_last, clips=key.shape[0])
    return scale * plan.joined(d_query), back(d_key), back(d_value)


class _Cut:
    """Splits clips, heads and queries into the blocks that are computed at a time.

    Attributes:
      group: heads per step, counted over all clips (clips x heads in all).
      count, rows: number of query blocks, and queries per block; the last block is padded.
    """

    def __init__(self, query: Array, key: Array):
        self.clips, self.length, self.heads, _ = query.shape
        scores, all_heads = self.length * key.shape[1], self.clips * self.heads
        most = max(1, min(_BLOCK // scores, all_heads))
        self.group = next(size for size in range(most, 0, -1) if all_heads % size == 0)
        self.rows = math.ceil(self.length / math.ceil(scores / _BLOCK))
        self.count = math.ceil(self.length / self.rows)

    def keys(self, x: Array) -> Array:
        """Reshapes `b r n k` to groups, heads per group, keys, channels."""
        return self._grouped(_heads_first(x))

    def queries(self, x: Array) -> Array:
        """Reshapes `b s n k` to groups, blocks, heads per group, queries per block, channels."""
        return self._blocks(_heads_first(x))

    def ranges(self, ranges: KeyRanges | None) -> tuple[Array | None, tuple[Any, ...]]:
        """Codes for every head, reshaped as `keys`; `low` and `high`, reshaped as `queries`."""
        if ranges is None:
            return None, ()
        codes, *limits = jax.tree.map(lambda x: jnp.repeat(x, self.heads, axis=0), ranges)
        return self._grouped(codes), jax.tree.map(self._blocks, tuple(limits))

    def joined(self, x: Array) -> Array:
        """Inverse of `queries`."""
        x = jnp.swapaxes(x, 1, 2)
        x = x.reshape(x.shape[0], self.group, self.count * self.rows, -1)[:, :, : self.length]
        return _heads_last(x, self.clips)

    def _grouped(self, x: Array) -> Array:
        return x.reshape(-1, self.group, *x.shape[1:])

    def _blocks(self, x: Array) -> Array:
        missing = self.count * self.rows - self.length
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(-1, self.group, self.count, self.rows, *x.shape[2:])
        return jnp.swapaxes(x, 1, 2)


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _heads_last(x: Array, clips: int) -> Array:
    return jnp.swapaxes(x.reshape(clips, -1, *x.shape[2:]), 1, 2)


def _products(x: Array, y: Array) -> Array:
    return jnp.einsum("gsk,grk->gsr", x, y)


def _masked(scores: Array, codes: Array | None, limits: tuple[Any, ...], otherwise: float) -> Array:
    return scores if codes is None else jnp.where(KeyRanges(codes, *limits).visible(), scores, otherwise)
