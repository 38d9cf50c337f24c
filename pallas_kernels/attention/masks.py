"""Which keys a query may see: one comparison for padding, packing, causality and windows over time."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["HIDDEN", "BlockMask", "KeyRanges", "causal_ranges", "segment_ranges"]

HIDDEN = -1
"""The code of a key that nobody sees."""


class KeyRanges(NamedTuple):
    """A query sees the keys whose code is in its range.

    Attributes:
      codes: int32, `b r`; of keys, 0 or more, or `HIDDEN`.
      low, high: int32, `b s`; of queries, 0 or more, inclusive; a query with `high < low` sees nothing.
    """

    codes: Array
    low: Array
    high: Array

    def visible(self) -> Array:
        """The whole mask, bool, `b s r`."""
        codes = self.codes[:, None, :]
        return (self.low[:, :, None] <= codes) & (codes <= self.high[:, :, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Which blocks of keys a block of queries sees, e.g. those of a window in time and space.

    Attributes:
      blocks: bool, `ceil(s / query_size) ceil(r / key_size)`; the same for the whole batch and all heads.
      query_size, key_size: tokens per block, multiples of 128; the last blocks may be shorter.
    """

    blocks: Array
    query_size: int = dataclasses.field(metadata={"static": True})
    key_size: int = dataclasses.field(metadata={"static": True})

    def visible(self, queries: int, keys: int) -> Array:
        """The whole mask, bool, `s r`."""
        rows = jnp.repeat(self.blocks, self.query_size, axis=0, total_repeat_length=None)[:queries]
        return jnp.repeat(rows, self.key_size, axis=1)[:, :keys]


def segment_ranges(query_segments: Array, key_segments: Array, key_mask: Array | None = None) -> KeyRanges:
    """A query sees keys of its own segment.

    Args:
      query_segments, key_segments: int, 0 or more, `b s` and `b r`.
      key_mask: bool, `b r`; keys that may be seen at all.
    """
    codes, own = key_segments.astype(jnp.int32), query_segments.astype(jnp.int32)
    return KeyRanges(codes if key_mask is None else jnp.where(key_mask, codes, HIDDEN), own, own)


def causal_ranges(
    query_times: Array,
    key_times: Array,
    *,
    past: int | None = None,
    segments: tuple[Array, Array] | None = None,
) -> KeyRanges:
    """A query sees keys of its own time (a frame, or a chunk of frames) and of earlier times.

    Args:
      query_times, key_times: int, `b s` and `b r`, from 0 to 2**16 - 1.
      past: how many earlier times are seen; None is all.
      segments: of queries and keys, 0 to 2**15 - 1; a query sees keys of its own segment only.
    """
    base, key_base = (0, 0) if segments is None else (x.astype(jnp.int32) << 16 for x in segments)
    high = query_times.astype(jnp.int32)
    low = jnp.zeros_like(high) if past is None else jnp.maximum(high - past, 0)
    return KeyRanges(key_times.astype(jnp.int32) + key_base, low + base, high + base)
