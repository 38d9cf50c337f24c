"""Which keys each query sees, as the key ranges that every attention backend takes.

A model computes ranges once per forward pass and passes them to all of its layers.
"""

import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Int
from vidgen.pallas_kernels.attention.masks import KeyRanges, causal_ranges, segment_ranges

__all__ = ["KeyRanges", "cross_attention_ranges", "self_attention_ranges"]

_PADDING = 2**14
"""Code of clip 0, the padding at the end of a packed row: nondecreasing codes skip the most blocks."""


def self_attention_ranges(
    clip_ids: Int[Array, "b s"] | None = None,
    chunk_ids: Int[Array, "b s"] | None = None,
    *,
    past_chunks: int | None = None,
    key_mask: Bool[Array, "b s"] | None = None,
) -> KeyRanges | None:
    """Ranges of self-attention; None if every token sees every token.

    Args:
      clip_ids: clip of each token, less than 2**14; a token sees only its clip. 0 is padding, which sees only
        padding.
      chunk_ids: causal chunk of each token, from 0 to 2**16 - 1; a token sees its chunk and earlier ones.
      past_chunks: number of earlier chunks that a token sees; None is all.
      key_mask: True for tokens that may be attended to.
    """
    return cross_attention_ranges(
        0 if key_mask is None else key_mask.shape[1],
        clip_ids=None if clip_ids is None else (clip_ids, clip_ids),
        chunk_ids=None if chunk_ids is None else (chunk_ids, chunk_ids),
        past_chunks=past_chunks,
        key_mask=key_mask,
    )


def cross_attention_ranges(
    num_queries: int,
    *,
    clip_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    chunk_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    past_chunks: int | None = None,
    key_mask: Bool[Array, "b r"] | None = None,
) -> KeyRanges | None:
    """Ranges of queries over other tokens, such as text; None if every query sees every key.

    Args:
      clip_ids, chunk_ids: of queries and of keys; these and the others are as in `self_attention_ranges`.
    """
    if clip_ids is not None:
        queries, keys = (jnp.where(ids == 0, _PADDING, ids) for ids in clip_ids)
        clip_ids = queries, keys
    if chunk_ids is not None:
        ranges = causal_ranges(*chunk_ids, past=past_chunks, segments=clip_ids)
    elif clip_ids is not None:
        ranges = segment_ranges(*clip_ids)
    elif key_mask is not None:
        zeros = jnp.zeros((key_mask.shape[0], num_queries), jnp.int32)
        ranges = KeyRanges(jnp.zeros_like(key_mask, jnp.int32), zeros)
    else:
        return None
    return ranges if key_mask is None else ranges.hide(key_mask)
