"""Attention to keys that arrive block by block: memory grows with the sequence, not with its square."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int

__all__ = ["ATTENTION", "Partial", "Sight", "attend", "begin", "finish", "gradients"]

ATTENTION = "attention"
"""The name, for policies of what is saved, of what attention gives and its backward pass takes from it."""

_LARGEST = 512
"""Keys whose scores are in memory at once."""

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Partial(NamedTuple):
    """Attention to the keys met so far, in float32 (online softmax, arXiv 1805.02867).

    Attributes:
      total: sum of the values, each times exp(score - largest).
      weight: sum of exp(score - largest).
      largest: score so far.
    """

    total: Float[Array, "b s n k"]
    weight: Float[Array, "b n s"]
    largest: Float[Array, "b n s"]


class Sight(NamedTuple):
    """Which keys of a block may be attended to, as `vidgen.ops.attention.attention` has it; None is all."""

    query_segments: Int[Array, "b s"] | None = None
    key_segments: Int[Array, "b r"] | None = None
    key_mask: Bool[Array, "b r"] | None = None


def begin(query: Float[Array, "b s n k"]) -> Partial:
    """Before any key is met."""
    # From the query's own numbers: within `shard_map` they then vary over the same mesh axes.
    rows = jnp.zeros_like(query[..., 0].swapaxes(1, 2), jnp.float32)
    return Partial(jnp.zeros_like(query, jnp.float32), rows, rows + jnp.finfo(jnp.float32).min)


def attend(
    partial: Partial,
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    sight: Sight,
) -> Partial:
    """`partial`, and these keys met too."""

    def absorb(partial: Partial, block: tuple) -> tuple[Partial, None]:
        key, value, *seen = block
        scores, mask = _scores(query, key, Sight(sight.query_segments, *seen))
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        largest = jnp.maximum(partial.largest, scores.max(-1))
        weights = jnp.exp(scores - largest[..., None])
        if mask is not None:  # A query that has met none of its keys yet: its largest score is not one.
            weights = jnp.where(mask, weights, 0.0)
        shrink = jnp.exp(partial.largest - largest)
        total = _product("bnsr,brnk->bsnk", weights.astype(value.dtype), value)
        total += partial.total * shrink.swapaxes(1, 2)[..., None]
        return Partial(total, partial.weight * shrink + weights.sum(-1), largest), None

    return jax.lax.scan(absorb, partial, _blocks(key, value, sight))[0]


def finish(partial: Partial) -> tuple[Float[Array, "b s n k"], Float[Array, "b n s"]]:
    """The mean of the values, zeros for a query that met no key, and the logarithm of the summed weights."""
    weight = jnp.where(partial.weight > 0, partial.weight, 1.0)
    return partial.total / weight.swapaxes(1, 2)[..., None], partial.largest + jnp.log(weight)


def gradients(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    sight: Sight,
    *,
    log_weight: Float[Array, "b n s"],
    cotangent: Float[Array, "b s n k"],
    mean_cotangent: Float[Array, "b n s"],
) -> tuple[Float[Array, "b s n k"], Float[Array, "b r n k"], Float[Array, "b r n k"]]:
    """What a block of keys adds to the gradient of the query, and the gradients of the keys and values.

    Weights are computed again from scores (FlashAttention, arXiv 2205.14135). In float32.

    Args:
      log_weight: of `finish`, after all blocks.
      cotangent: of the attention's result.
      mean_cotangent: products of the cotangent with the attention's result, summed over the head's channels.
    """
    scale = query.shape[-1] ** -0.5

    def one(sum_query: Array, block: tuple) -> tuple[Array, tuple[Array, Array]]:
        key, value, *seen = block
        scores, mask = _scores(query, key, Sight(sight.query_segments, *seen))
        weights = jnp.exp(scores - log_weight[..., None])
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        of_value = _product("bnsr,bsnk->brnk", weights.astype(value.dtype), cotangent)
        of_weights = _product("bsnk,brnk->bnsr", cotangent, value)
        of_scores = (scale * weights * (of_weights - mean_cotangent[..., None])).astype(query.dtype)
        sum_query += _product("bnsr,brnk->bsnk", of_scores, key)
        return sum_query, (_product("bnsr,bsnk->brnk", of_scores, query), of_value)

    blocks = _blocks(key, value, sight)
    of_query, (of_key, of_value) = jax.lax.scan(one, jnp.zeros_like(query, jnp.float32), blocks)
    return of_query, _joined(of_key), _joined(of_value)


def _scores(query: Array, key: Array, sight: Sight) -> tuple[Array, Array | None]:
    scores = _product("bsnk,brnk->bnsr", query, key)
    mask = None if sight.key_mask is None else sight.key_mask[:, None, None, :]
    if sight.query_segments is not None:
        assert sight.key_segments is not None
        same = (sight.query_segments[:, :, None] == sight.key_segments[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return query.shape[-1] ** -0.5 * scores, mask


def _blocks(key: Array, value: Array, sight: Sight) -> tuple[Array | None, ...]:
    """Keys, values, and the keys' part of `sight`, in equal blocks along a new first axis."""
    length = key.shape[1]
    size = max(n for n in range(1, min(length, _LARGEST) + 1) if length % n == 0)
    if size < _LARGEST // 8:  # No good divisor: all at once is better than a few at a time.
        size = length

    def cut(x: Array | None) -> Array | None:
        if x is None:
            return None
        return x.reshape(x.shape[0], length // size, size, *x.shape[2:]).swapaxes(0, 1)

    return cut(key), cut(value), cut(sight.key_segments), cut(sight.key_mask)


def _joined(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
