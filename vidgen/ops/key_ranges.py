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
    clips = None if clip_ids is None else (_codes(clip_ids),) * 2
    if chunk_ids is not None:
        ranges = causal_ranges(chunk_ids, chunk_ids, past=past_chunks, segments=clips)
    elif clips is not None:
        ranges = segment_ranges(*clips)
    elif key_mask is not None:
        ranges = _one_code(key_mask, key_mask.shape[1])
    else:
        return None
    return ranges if key_mask is None else ranges.hide(key_mask)


def cross_attention_ranges(
    num_queries: int,
    *,
    clip_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    key_mask: Bool[Array, "b r"] | None = None,
) -> KeyRanges | None:
    """Ranges of `num_queries` queries over other tokens; None if every query sees every key.

    Args:
      clip_ids: clips of queries and of keys, as in `self_attention_ranges`.
      key_mask: True for keys that may be attended to.
    """
    if clip_ids is not None:
        queries, keys = clip_ids
        return segment_ranges(_codes(queries), _codes(keys), key_mask)
    return None if key_mask is None else _one_code(key_mask, num_queries).hide(key_mask)


def _codes(clip_ids: Array) -> Array:
    return jnp.where(clip_ids == 0, _PADDING, clip_ids)


def _one_code(key_mask: Array, num_queries: int) -> KeyRanges:
    """Ranges with which every query sees every key."""
    batch, num_keys = key_mask.shape
    return KeyRanges(jnp.zeros((batch, num_keys), jnp.int32), jnp.zeros((batch, num_queries), jnp.int32))
