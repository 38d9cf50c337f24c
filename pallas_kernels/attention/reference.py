"""Reference attention in plain JAX: specifies the kernels' results, and the tests compare with it."""

import jax
import jax.numpy as jnp
from jax import Array

from .masks import BlockMask, KeyRanges

__all__ = ["backward", "forward"]


def forward(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[Array, Array]:
    """Softmax attention; zeros for a query that sees no key.

    Args:
      query, key, value: `b s n k`, `b r n k`, `b r n k`.
      scale: factor on the query-key products, 1 / sqrt(k) by default.
      ranges, block_mask: masks; a query sees a key if both allow it.

    Returns:
      The weighted mean of the values, `b s n k`, in their dtype; and the log-sum-exp of the scores, float32,
      `b n s`, -inf for a query that sees no key.
    """
    scores, mask = _scores(query, key, scale, ranges, block_mask)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - largest), 0.0)
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    weights = weights / jnp.where(seen, total, 1.0)
    output = jnp.einsum("bnsr,brnk->bsnk", weights, value.astype(weights.dtype))
    log_sum_exp = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return output.astype(value.dtype), log_sum_exp[..., 0]


def backward(
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    log_sum_exp: Array,
    cotangent: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value from the output's cotangent, `b s n k` (arXiv 2205.14135).

    `output` and `log_sum_exp` may come from attention to a superset of these keys: gradients over the subsets
    then add up.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores, mask = _scores(query, key, scale, ranges, block_mask)
    finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0.0)[..., None]
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, -jnp.inf) - finite), 0.0)
    wide = lambda x: x.astype(scores.dtype)  # noqa: E731
    mean = jnp.einsum("bsnk,bsnk->bns", wide(output), wide(cotangent))
    of_weights = jnp.einsum("bsnk,brnk->bnsr", wide(cotangent), wide(value))
    of_scores = factor * weights * (of_weights - mean[..., None])
    d_query = jnp.einsum("bnsr,brnk->bsnk", of_scores, wide(key))
    d_key = jnp.einsum("bnsr,bsnk->brnk", of_scores, wide(query))
    d_value = jnp.einsum("bnsr,bsnk->brnk", weights, wide(cotangent))
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


def _scores(
    query: Array, key: Array, scale: float | None, ranges: KeyRanges | None, block_mask: BlockMask | None
) -> tuple[Array, Array]:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    with jax.default_matmul_precision("highest"):
        scores = factor * jnp.einsum("bsnk,brnk->bnsr", query.astype(dtype), key.astype(dtype))
    mask = jnp.ones((1, 1, *scores.shape[2:]), bool)
    if ranges is not None:
        mask = mask & ranges.visible()[:, None]
    if block_mask is not None:
        mask = mask & block_mask.visible(*scores.shape[2:])[None, None]
    return jnp.where(mask, scores, jnp.finfo(dtype).min), jnp.broadcast_to(mask, scores.shape)
