"""Attention dispatch: one function for every model, the backend chosen by platform and shape."""

from typing import Literal

import jax

from vidgen.core.typing import Array, Bool, Float, Int

Implementation = Literal["xla", "cudnn"]


def attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    *,
    key_mask: Bool[Array, "b r"] | None = None,
    segment_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b s n k"]:
    """Softmax attention with scale 1 / sqrt(k), scores and softmax in float32.

    Args:
      key_mask: which keys may be attended to; at least one per row.
      segment_ids: of queries and keys; a query attends to keys of its own segment only.
      implementation: forces a backend; None lets JAX choose.
    """
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
    if segment_ids is not None:
        same = (segment_ids[0][:, :, None] == segment_ids[1][:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
