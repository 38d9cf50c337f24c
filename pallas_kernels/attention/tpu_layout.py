"""How heads lie in the arrays that the TPU kernels read, and what both kernels share."""

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
"""A score that counts for nothing, finite so that differences of two are not NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads as lanes of `b s (n k)`, which is `b s n k` without a transpose.

    A kernel's block is `lanes` wide and holds some heads side by side: one or more, or pairs of 64 channels.

    Attributes:
      count: heads.
      dim: channels of a head.
      padded: channels that a head is given; more than `dim` only where it does not fit otherwise.
      together: heads of one block.
    """

    count: int
    dim: int
    padded: int
    together: int

    @classmethod
    def of(cls, query: Array, at_once: int = 1) -> "Heads":
        """Of `b s n k`.

        Args:
          at_once: heads, or pairs of 64 channels, that a block holds; fewer where this is no divisor.

        Raises:
          NotImplementedError: a head has more than 256 channels.
        """
        *_, count, dim = query.shape
        if dim > 256:
            raise NotImplementedError(f"attention: heads of {dim} channels; the kernel has at most 256")
        pair = 2 if dim == LANES // 2 and count % 2 == 0 else 1
        padded = dim if pair == 2 else -(-dim // LANES) * LANES
        at_once = next(n for n in range(at_once, 0, -1) if count // pair % n == 0)
        return cls(count=count, dim=dim, padded=padded, together=at_once * pair)

    @property
    def lanes(self) -> int:
        """Of a block."""
        return self.together * self.padded

    @property
    def paired(self) -> bool:
        """Two heads share 128 lanes."""
        return self.padded < LANES

    @property
    def width(self) -> int:
        """Lanes that a product goes over: of a head, or of a pair, of which one head's are zero."""
        return max(LANES, self.padded)

    def window(self, head: int) -> slice:
        """The `width` lanes of a block in which a head of it lies."""
        start = head * self.padded // self.width * self.width
        return slice(start, start + self.width)

    @property
    def groups(self) -> int:
        return self.count // self.together

    def merged(self, x: Array) -> Array:
        """`b s n k` as `b s (n k)`."""
        if self.padded != self.dim:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.padded - self.dim)))
        return x.reshape(*x.shape[:2], self.count * self.padded)

    def split(self, x: Array) -> Array:
        """Back from `merged`."""
        x = x.reshape(*x.shape[:2], self.count, self.padded)
        return x[..., : self.dim] if self.padded != self.dim else x

    def cost(self, arrays: Sequence[Any], products: int, *, batch: int, scores: int) -> pl.CostEstimate:
        """Of a kernel that meets everything.

        Args:
          arrays: what is read and written.
          products: of matrices, of the size of a head's scores times its channels.
          scores: of one head, queries times keys.
        """
        scores *= batch * self.count
        return pl.CostEstimate(
            flops=2 * products * scores * self.dim,
            transcendentals=scores,
            bytes_accessed=sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays),
        )

    def rows(self, head: int) -> slice:
        """Channels of one of the heads of a block."""
        return slice(head * self.padded, (head + 1) * self.padded)

    def own(self, head: int, shape: tuple[int, ...], axis: int) -> Array:
        """Which elements of a head's window, along an axis of channels, are of this head."""
        channel = lax.broadcasted_iota(jnp.int32, shape, axis)
        first = head * self.padded % self.width
        return (channel >= first) & (channel < first + self.padded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """What a kernel is told about what is seen.

    Attributes:
      schedule: `Dense` or `Sparse`.
      codes, low, high: int32, `b 1 r` and `b 1 s` (b may be 1), padded to whole blocks; None where nothing is
        masked, and no `high` where it is `low`.
    """

    schedule: Dense | Sparse
    codes: Array | None
    low: Array | None
    high: Array | None

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(x for x in (self.codes, self.low, self.high) if x is not None)

    def specs(self, blocks: BlockSizes, *, queries_outside: bool) -> list[pl.BlockSpec]:
        """Of `arrays`; `queries_outside` where blocks of queries are the outer ones."""

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
    """Plans a kernel's schedule.

    Args:
      only: bool, `b q`: blocks of queries that are to be met at all.
    """
    (batch, queries, *_), keys = query.shape, key.shape[1]
    counts = -(-queries // blocks.queries), -(-keys // blocks.keys)
    if ranges is None and block_mask is None and only is None:
        outer, inner = counts if queries_outside else counts[::-1]
        schedule = Dense(outer=outer, inner=inner)
    else:
        sizes = {"query_block": blocks.queries, "key_block": blocks.keys}
        some, whole = seen_blocks(ranges, block_mask, queries=queries, keys=keys, **sizes)
        if only is not None:
            # An output block that is met is written: where nothing is to be done, the first is done again.
            only = only | (
                (lax.broadcasted_iota(jnp.int32, only.shape, 1) == 0) & ~only.any(1, keepdims=True)
            )
            some = jnp.broadcast_to(some, (batch, *counts)) & only[:, :, None]
            schedule = Sparse(some, jnp.broadcast_to(whole, some.shape), inner_once=False, required=only)
        elif queries_outside:
            schedule = Sparse(some, whole, inner_once=False)
        else:
            schedule = Sparse(some.swapaxes(1, 2), whole.swapaxes(1, 2), inner_once=True)
    if ranges is None:
        return Masking(schedule=schedule, codes=None, low=None, high=None)
    to_blocks = lambda x, size: (0, -x.shape[1] % size)  # noqa: E731
    codes, low, high = ranges
    codes = jnp.pad(codes, ((0, 0), to_blocks(codes, blocks.keys)), constant_values=HIDDEN)
    # Queries beyond the end see what the last one sees: that a row sees nothing is then of that row's making.
    wide = lambda x: jnp.pad(x, ((0, 0), to_blocks(x, blocks.queries)), mode="edge")[:, None]  # noqa: E731
    return Masking(
        schedule=schedule, codes=codes[:, None], low=wide(low), high=None if high is low else wide(high)
    )


def filled(x: Array, left: Any, other: Any, axis: int = 0) -> Array:
    """A block of which only the first `left` tokens are there, and in place of the others `other`."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < left, x, other)


def dot(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    """Product of two matrices over one dimension of each, in float32; of float32 to float32's precision."""
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
      codes: of keys, the same in all of 128 lanes.
      low, high: of queries, `1 q`; `high` may be None.
    """
    codes = jnp.tile(codes, (1, shape[1] // LANES))
    if high is None:
        return codes == low
    return (codes >= low) & (codes <= high)
