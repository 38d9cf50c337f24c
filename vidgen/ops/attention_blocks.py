"""Blockwise attention with mergeable partial results: memory is linear in the sequence length."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array, Float
from vidgen.ops.key_ranges import KeyRanges
from vidgen.pallas_kernels.attention.masks import HIDDEN

__all__ = ["ATTENTION", "AttentionKernel", "Blocks", "PartialAttention", "block_score_bytes", "merge"]

ATTENTION = "attention"
"""`checkpoint_name` of the attention outputs that the backward pass needs, for remat policies."""

_LARGEST = 512
"""Most keys per block; the scores of one block are in memory at a time."""

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class PartialAttention(NamedTuple):
    """Attention to a subset of the keys.

    Attributes:
      mean: mean of the values weighted by exp(score); zeros for a query that sees no key. Heads and channels
        share one axis, as in the TPU kernels: to split it on a TPU means a copy to another layout.
      log_sum_exp: logarithm of the sum of exp(score), float32; -inf for a query that sees no key.
    """

    mean: Float[Array, "b s d"]
    log_sum_exp: Float[Array, "b n s"]


@runtime_checkable
class AttentionKernel(Protocol):
    """Attention of queries to a subset of the keys: `Blocks` or `vidgen.ops.attention_kernels.Kernels`.

    Both passes raise NotImplementedError for unsupported shapes or dtypes.
    """

    @property
    def forward(self) -> Callable[..., tuple[Array, Array]]:
        """(query, key, value, *, scale, ranges) -> mean and log-sum-exp.

        The mean is `b s n k`, float32 or `value`'s dtype; log-sum-exp is as in `PartialAttention`.
        """
        ...

    @property
    def backward(self) -> Callable[..., tuple[Array, Array, Array]]:
        """(query, key, value, output, log_sum_exp, cotangent, *, scale, ranges) -> gradients.

        They are the subset's share of the query gradient, and the gradients of its keys and values. `output`
        and `log_sum_exp` are results of attention to all keys, not only to this subset; `cotangent` is the
        gradient of the loss with respect to `output`.
        """
        ...


def merge(one: PartialAttention, other: PartialAttention) -> PartialAttention:
    """Attention to the union of two disjoint key subsets, in float32."""
    log_sum_exp = jnp.logaddexp(one.log_sum_exp, other.log_sum_exp)
    finite = jnp.maximum(log_sum_exp, jnp.finfo(jnp.float32).min)
    heads = log_sum_exp.shape[1]
    # A product with 0/1 repeats each head's share over its channels: exact, and in the layout of the mean.
    channels = jnp.repeat(jnp.eye(heads, dtype=jnp.float32), one.mean.shape[-1] // heads, axis=1)

    def weighted(part: PartialAttention) -> Array:
        shares = jnp.exp(part.log_sum_exp - finite)
        return jnp.einsum("bns,nd->bsd", shares, channels, precision="highest") * part.mean.astype(
            jnp.float32
        )

    return PartialAttention(weighted(one) + weighted(other), log_sum_exp)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`AttentionKernel` in plain JAX that loops over blocks of keys; results are float32."""

    def forward(
        self, query: Array, key: Array, value: Array, *, scale: float, ranges: KeyRanges | None
    ) -> tuple[Array, Array]:
        """`AttentionKernel.forward` by an online softmax (arXiv 1805.02867)."""
        lowest, key_blocks = jnp.finfo(jnp.float32).min, _KeyBlocks(key, ranges)

        def absorb(carry: tuple[Array, Array, Array], block: tuple):
            total, weight, largest_before = carry
            key, value, codes = block
            scores, mask = _scores(query, key, scale, key_blocks.ranges, codes)
            if mask is not None:
                scores = jnp.where(mask, scores, lowest)
            largest = jnp.maximum(largest_before, scores.max(-1))
            weights = jnp.exp(scores - largest[..., None])
            if mask is not None:  # Before a query's first visible key, `largest` is `lowest`: exp gives 1.
                weights = jnp.where(mask, weights, 0.0)
            shrink = jnp.exp(largest_before - largest)
            added = _product("bnsr,brnk->bsnk", weights.astype(value.dtype), value)
            total = total * shrink.swapaxes(1, 2)[..., None] + added
            return (total, weight * shrink + weights.sum(-1), largest), None

        zeros = jnp.zeros_like(query[..., 0].swapaxes(1, 2), jnp.float32)
        start = (jnp.zeros_like(query, jnp.float32), zeros, zeros + lowest)
        (total, weight, largest), _ = jax.lax.scan(absorb, start, key_blocks.blocks(key, value))
        seen = weight > 0
        weight = jnp.where(seen, weight, 1.0)
        mean = total / weight.swapaxes(1, 2)[..., None]
        return mean, jnp.where(seen, largest + jnp.log(weight), -jnp.inf)

    def backward(
        self,
        query: Array,
        key: Array,
        value: Array,
        output: Array,
        log_sum_exp: Array,
        cotangent: Array,
        *,
        scale: float,
        ranges: KeyRanges | None,
    ) -> tuple[Array, Array, Array]:
        """`AttentionKernel.backward`; recomputes the softmax weights from scores (arXiv 2205.14135)."""
        mean_cotangent, key_blocks = _product("bsnk,bsnk->bns", output, cotangent), _KeyBlocks(key, ranges)

        def one(sum_query: Array, block: tuple) -> tuple[Array, tuple[Array, Array]]:
            key, value, codes = block
            scores, mask = _scores(query, key, scale, key_blocks.ranges, codes)
            weights = jnp.exp(scores - log_sum_exp[..., None])
            if mask is not None:
                weights = jnp.where(mask, weights, 0.0)
            of_value = _product("bnsr,bsnk->brnk", weights.astype(value.dtype), cotangent)
            of_weights = _product("bsnk,brnk->bnsr", cotangent, value)
            of_scores = (scale * weights * (of_weights - mean_cotangent[..., None])).astype(query.dtype)
            sum_query += _product("bnsr,brnk->bsnk", of_scores, key)
            return sum_query, (_product("bnsr,bsnk->brnk", of_scores, query), of_value)

        start = jnp.zeros_like(query, jnp.float32)
        of_query, (of_key, of_value) = jax.lax.scan(one, start, key_blocks.blocks(key, value))
        return of_query, key_blocks.joined(of_key), key_blocks.joined(of_value)


def _scores(
    query: Array, key: Array, scale: float, ranges: KeyRanges | None, codes: Array | None
) -> tuple[Array, Array | None]:
    scores = scale * _product("bsnk,brnk->bnsr", query, key)
    if ranges is None or codes is None:
        return scores, None
    return scores, ranges._replace(codes=codes).visible()[:, None]


class _KeyBlocks:
    """Equal blocks of at most `_LARGEST` keys; the last block is padded with hidden keys.

    Attributes:
      ranges: the ranges passed in; if they are None and the last block is padded, ranges that hide only the
        padding.
    """

    def __init__(self, key: Array, ranges: KeyRanges | None):
        self.length = key.shape[1]
        self.count = _block_count(self.length)
        self.size = -(-self.length // self.count)
        if ranges is None and self.count * self.size > self.length:
            ranges = KeyRanges(jnp.zeros((1, self.length), jnp.int32), jnp.zeros((1, 1), jnp.int32))
        self.ranges = ranges

    def blocks(self, key: Array, value: Array) -> tuple[Array, Array, Array | None]:
        """Keys, values and key codes, with the blocks along a new leading axis."""
        codes = None if self.ranges is None else self._split(self.ranges.codes, HIDDEN)
        return self._split(key), self._split(value), codes

    def joined(self, x: Array) -> Array:
        """Inverse of `blocks` for one array."""
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, : self.length]

    def _split(self, x: Array, fill: int = 0) -> Array:
        missing = self.count * self.size - self.length
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(x.shape[0], self.count, self.size, *x.shape[2:]).swapaxes(0, 1)


def _block_count(length: int) -> int:
    """Number of blocks: one that needs no padding, up to 8 times the fewest; otherwise the fewest."""
    fewest = -(-length // _LARGEST)
    exact = (n for n in range(fewest, 8 * fewest + 1) if length % n == 0)
    return next(exact, fewest)


def block_score_bytes(queries: int, keys: int) -> int:
    """Bytes of scores that `Blocks` holds in memory at a time, for one head of one clip."""
    return 4 * queries * -(-keys // _block_count(keys))
