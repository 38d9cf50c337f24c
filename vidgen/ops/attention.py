"""Attention dispatch: one function for every model, the backend chosen by platform and shape."""

from typing import Literal

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int

Implementation = Literal["xla", "cudnn"]


def attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    *,
    key_mask: Bool[Array, "b r"] | None = None,
    segment_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    bias: Float[Array, "#b n s r"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "b s n k"]:
    """Softmax attention, scores and softmax in float32.

    Args:
      key_mask: which keys may be attended to; at least one per row.
      segment_ids: of queries and keys; a query attends to keys of its own segment only.
      bias: added to the scores.
      scale: of the products, 1 / sqrt(k) by default.
      implementation: `xla` is plain products and a softmax; `cudnn` is NVIDIA's fused kernel, for 16 bits.
    """
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
    if segment_ids is not None:
        same = (segment_ids[0][:, :, None] == segment_ids[1][:, None, :])[:, None]
        mask = same if mask is None else mask & same
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=scale, implementation="cudnn"
        )
    return _reference(query, key, value, mask, bias, scale)


def _reference(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float | None
) -> Array:
    # `jax.nn.dot_product_attention` computes the same, but its backward pass is several times slower on CPU.
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * jnp.einsum("bsnk,brnk->bnsr", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnsr,brnk->bsnk", weights, value)
