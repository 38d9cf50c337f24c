"""Layout of heads in the TPU kernels' arrays, their masks and schedules, and shared helpers."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from .block_schedule import Dense, Sparse, seen_blocks
from .masks import HIDDEN, BlockMask, KeyRanges
from .specs import BlockSizes

__all__ = ["LANES", "LOG2_E", "NEGATIVE", "Heads", "Masking", "dot", "filled", "masking", "visible"]

LANES = 128
LOG2_E = math.log2(math.e)
NEGATIVE = -1e30
"""Score of a hidden key: its weight is zero; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Layout of heads along the lanes of `b s (n k)`, a reshape of `b s n k` without a transpose.

    A kernel's block is `lanes` wide and holds adjacent heads: one or more, or pairs of 64 channels each.

    Attributes:
      count: number of heads.
      dim: channels of a head.
      padded: lanes per head; `dim` for paired heads, else `dim` rounded up to a multiple of `LANES`.
      together: heads per block.
    """

    count: int
    dim: int
    padded: int
    together: int

    @classmethod
    def of(cls, query: Array, at_once: int = 1) -> "Heads":
        """Layout of the heads of `query`, `b s n k`.

        Args:
          at_once: most heads, or pairs of heads with 64 channels, per block; the largest divisor up to this.

        Raises:
          NotImplementedError: a head has more than 256 channels.
        """
        *_, count, dim = query.shape
        if dim > 256:
            raise NotImplementedError(f"attention: heads of {dim} channels; the kernel takes at most 256")
        pair = 2 if dim == LANES // 2 and count % 2 == 0 else 1
        padded = dim if pair == 2 else -(-dim // LANES) * LANES
        at_once = next(n for n in range(at_once, 0, -1) if count // pair % n == 0)
        return cls(count=count, dim=dim, padded=padded, together=at_once * pair)

    @property
    def lanes(self) -> int:
        """Lanes of a block."""
        return self.together * self.padded

    @property
    def paired(self) -> bool:
        """Whether two heads share 128 lanes."""
        return self.padded < LANES

    @property
    def width(self) -> int:
        """Lanes of a matrix product: those of a head, or of a pair with the other head's lanes zero."""
        return max(LANES, self.padded)

    def window(self, head: int) -> slice:
        """The `width` lanes of a block that contain one of its heads."""
        start = head * self.padded // self.width * self.width
        return slice(start, start + self.width)

    @property
    def groups(self) -> int:
        return self.count // self.together

    def merged(self, x: Array) -> Array:
        """Reshapes `b s n k` to `b s (n k)`, with heads padded to `padded` lanes."""
        if self.padded != self.dim:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.padded - self.dim)))
        return x.reshape(*x.shape[:2], self.count * self.padded)

    def split(self, x: Array) -> Array:
        """Inverse of `merged`."""
        x = x.reshape(*x.shape[:2], self.count, self.padded)
        return x[..., : self.dim] if self.padded != self.dim else x

    def cost(self, arrays: Sequence[Any], products: int, *, batch: int, scores: int) -> pl.CostEstimate:
        """Cost estimate of a kernel that computes all pairs of blocks.

        Args:
          arrays: arrays that the kernel reads and writes.
          products: number of matrix products, each of queries x keys x channels multiply-adds per head.
          scores: queries x keys, the scores of one head.
        """
        scores *= batch * self.count
        return pl.CostEstimate(
            flops=2 * products * scores * self.dim,
            transcendentals=scores,
            bytes_accessed=sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays),
        )

    def rows(self, head: int) -> slice:
        """The channels of one head within a block."""
        return slice(head * self.padded, (head + 1) * self.padded)

    def own(self, head: int, shape: tuple[int, ...], axis: int) -> Array:
        """Mask of the elements of a head's window, along the axis of channels, that belong to this head."""
        channel = lax.broadcasted_iota(jnp.int32, shape, axis)
        first = head * self.padded % self.width
        return (channel >= first) & (channel < first + self.padded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Block schedule and mask arrays of a kernel.

    Attributes:
      schedule: `Dense` or `Sparse`.
      codes, low, high: int32, `b 1 r` and `b 1 s` (b may be 1), padded to whole blocks; None without key
        ranges, and `high` is None as in `KeyRanges`.
    """

    schedule: Dense | Sparse
    codes: Array | None
    low: Array | None
    high: Array | None

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(x for x in (self.codes, self.low, self.high) if x is not None)

    def specs(self, blocks: BlockSizes, *, queries_outside: bool) -> list[pl.BlockSpec]:
        """Block specs of `arrays`; `queries_outside` says that blocks of queries are the outer ones."""

        def spec(x: Array, size: int, outside: bool) -> pl.BlockSpec:
            one = x.shape[0] == 1
            index = lambda b, g, outer, inner, _: (0 if one else b, 0, outer if outside else inner)  # noqa: E731
            return pl.BlockSpec((None, 1, size), self.schedule.map(index))

        of_queries = functools.partial(spec, size=blocks.queries, outside=queries_outside)
        of_keys = functools.partial(spec, size=blocks.keys, outside=not queries_outside)
        return [of_keys(x) if x is self.codes else of_queries(x) for x in self.arrays]


def masking(
    query: Array,
    key: Array,
    blocks: BlockSizes,
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
    *,
    queries_outside: bool,
    only: Array | None = None,
) -> Masking:
    """Schedule and mask arrays of a kernel.

    Args:
      queries_outside: whether blocks of queries are the outer ones.
      only: bool, `b q`: blocks of queries to schedule; None is all.
    """
    (batch, queries, *_), keys = query.shape, key.shape[1]
    counts = -(-queries // blocks.queries), -(-keys // blocks.keys)
    if ranges is None and block_mask is None and only is None:
        outer, inner = counts if queries_outside else counts[::-1]
        schedule = Dense(outer=outer, inner=inner)
    else:
        sizes = {"query_block": blocks.queries, "key_block": blocks.keys}
        any_visible, all_visible = seen_blocks(ranges, block_mask, queries=queries, keys=keys, **sizes)
        if only is not None:
            # Each example has a step, and each step writes an output block: if none is due, redo the first.
            only = only | (
                (lax.broadcasted_iota(jnp.int32, only.shape, 1) == 0) & ~only.any(1, keepdims=True)
            )
            any_visible = jnp.broadcast_to(any_visible, (batch, *counts)) & only[:, :, None]
            all_visible = jnp.broadcast_to(all_visible, any_visible.shape)
            schedule = Sparse(any_visible, all_visible, inner_once=False, required=only)
        elif queries_outside:
            schedule = Sparse(any_visible, all_visible, inner_once=False)
        else:
            schedule = Sparse(any_visible.swapaxes(1, 2), all_visible.swapaxes(1, 2), inner_once=True)
    if ranges is None:
        return Masking(schedule=schedule, codes=None, low=None, high=None)
    to_blocks = lambda x, size: (0, -x.shape[1] % size)  # noqa: E731
    codes, low, high = ranges
    codes = jnp.pad(codes, ((0, 0), to_blocks(codes, blocks.keys)), constant_values=HIDDEN)
    # Padding queries repeat the last query's range, so that they do not change which blocks see no key.
    wide = lambda x: jnp.pad(x, ((0, 0), to_blocks(x, blocks.queries)), mode="edge")[:, None]  # noqa: E731
    return Masking(
        schedule=schedule, codes=codes[:, None], low=wide(low), high=None if high is None else wide(high)
    )


def filled(x: Array, count: Any, other: Any, axis: int = 0) -> Array:
    """`x` with all but the first `count` tokens along `axis` replaced by `other`."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, other)


def dot(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    """Matrix product over one dimension of each, in float32; full float32 precision for float32 inputs."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def visible(codes: Any, low: Any, high: Any, shape: tuple[int, ...]) -> Array:
    """The mask of a unit, keys by queries.

    Args:
      codes: codes of keys, repeated over 128 lanes.
      low, high: ranges of queries, `1 q`; None for `high` means that it equals `low`.
    """
    codes = jnp.tile(codes, (1, shape[1] // LANES))
    if high is None:
        return codes == low
    return (codes >= low) & (codes <= high)
