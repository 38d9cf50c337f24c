"""Masks as key ranges: one comparison covers padding, packing, causality and windows over time."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["HIDDEN", "BlockMask", "KeyRanges", "causal_ranges", "segment_ranges"]

HIDDEN = -1
"""The code of a key that no query sees."""


class KeyRanges(NamedTuple):
    """A query sees the keys whose code is in its range.

    Attributes:
      codes: code of each key, int32, `b r`; >= 0, or `HIDDEN`.
      low, high: inclusive range of each query, int32, `b s`, >= 0; a query with `high < low` sees nothing.
        `high` is None if it equals `low`: then one comparison makes the mask.
    """

    codes: Array
    low: Array
    high: Array | None = None

    @property
    def limits(self) -> tuple[Array, Array]:
        """`low` and `high`, both as arrays."""
        return self.low, self.low if self.high is None else self.high

    def visible(self) -> Array:
        """The dense mask, bool, `b s r`."""
        codes, low = self.codes[:, None, :], self.low[:, :, None]
        if self.high is None:
            return codes == low
        return (low <= codes) & (codes <= self.high[:, :, None])

    def hide(self, key_mask: Array) -> "KeyRanges":
        """These ranges, with keys hidden from all queries where `key_mask`, bool, `b r`, is False."""
        return self._replace(codes=jnp.where(key_mask, self.codes, HIDDEN))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Blocks of keys that each block of queries sees, e.g. a window in time and space.

    Attributes:
      blocks: bool, `ceil(s / query_size) ceil(r / key_size)`; shared by all examples and heads.
      query_size, key_size: tokens per block, multiples of 128; the last blocks may be shorter.
    """

    blocks: Array
    query_size: int = dataclasses.field(metadata={"static": True})
    key_size: int = dataclasses.field(metadata={"static": True})

    def visible(self, queries: int, keys: int) -> Array:
        """The dense mask, bool, `s r`."""
        rows = jnp.repeat(self.blocks, self.query_size, axis=0, total_repeat_length=None)[:queries]
        return jnp.repeat(rows, self.key_size, axis=1)[:, :keys]


def segment_ranges(query_segments: Array, key_segments: Array, key_mask: Array | None = None) -> KeyRanges:
    """Ranges with which a query sees the keys of its segment.

    Args:
      query_segments, key_segments: segment ids, int, >= 0, `b s` and `b r`.
      key_mask: bool, `b r`; False hides a key from all queries.
    """
    ranges = KeyRanges(key_segments.astype(jnp.int32), query_segments.astype(jnp.int32))
    return ranges if key_mask is None else ranges.hide(key_mask)


def causal_ranges(
    query_times: Array,
    key_times: Array,
    *,
    past: int | None = None,
    segments: tuple[Array, Array] | None = None,
) -> KeyRanges:
    """Ranges with which a query sees keys of the same time (a frame or causal chunk) and of earlier times.

    Args:
      query_times, key_times: int, `b s` and `b r`, from 0 to 2**16 - 1.
      past: number of earlier times that a query sees; None is all.
      segments: segment ids of queries and keys, 0 to 2**15 - 1; a query sees only keys of its segment.
    """
    base, key_base = (0, 0) if segments is None else (x.astype(jnp.int32) << 16 for x in segments)
    high = query_times.astype(jnp.int32)
    low = jnp.zeros_like(high) if past is None else jnp.maximum(high - past, 0)
    return KeyRanges(key_times.astype(jnp.int32) + key_base, low + base, high + base)
