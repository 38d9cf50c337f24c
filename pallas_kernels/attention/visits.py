"""The order in which a kernel meets blocks of queries and keys, and which of them it need not meet.

A kernel goes through an outer sequence of blocks (queries in the forward pass, keys in the backward pass)
and, for each, through inner ones. `Dense` is all of them, known when the program is compiled. `Sparse` is a
list computed on the device from what the masks leave: its length is the grid's, so that empty blocks cost
nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.attention.masks import BlockMask, KeyRanges

__all__ = ["Dense", "Seen", "Sparse", "Visit", "seen_blocks"]

_FIRST, _LAST, _ACTIVE, _FULL, _FIRST_INNER, _LAST_INNER = (1 << bit for bit in range(6))
_FLAG_BITS = 6
_MOST = 1 << 17
"""Visits of all rows together; their two words each lie in scalar memory."""


class Visit(NamedTuple):
    """Where a kernel is.

    Attributes:
      outer, inner: numbers of the blocks.
      first, last: of this outer block.
      first_inner, last_inner: of this inner block.
      active: there is something to compute.
      full: every query sees every key.
    """

    outer: Any
    inner: Any
    first: Any
    last: Any
    first_inner: Any
    last_inner: Any
    active: Any
    full: Any


class Seen(NamedTuple):
    """What the masks leave of each block of queries (rows) and keys (columns), bool, `b q k` (or `1 q k`)."""

    some: Array
    whole: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """All pairs of blocks.

    Attributes:
      partial_outer, partial_inner: the last block of these is not full, since the sequence ends in it.
    """

    outer: int
    inner: int
    partial_outer: bool = False
    partial_inner: bool = False

    prefetch: tuple[Array, ...] = ()

    def grid(self, batch: int, groups: int) -> tuple[int, ...]:
        return batch, groups, self.outer, self.inner

    def map(self, index: Callable[..., tuple]) -> Callable[..., tuple]:
        """An index map of a block, given `index(batch, group, outer, inner, flushed)`."""

        def mapped(batch, group, outer, inner):
            flushed = jnp.where(outer == self.outer - 1, inner, 0)
            return index(batch, group, outer, inner, flushed)

        return mapped

    def visit(self, batch_axis: int, words: tuple[Any, ...]) -> Visit:
        """Within the kernel."""
        del words
        outer, inner = pl.program_id(batch_axis + 2), pl.program_id(batch_axis + 3)
        full: Any = True
        if self.partial_outer:
            full = outer < self.outer - 1
        if self.partial_inner:
            full = (inner < self.inner - 1) & full
        return Visit(
            outer,
            inner,
            first=inner == 0,
            last=inner == self.inner - 1,
            first_inner=outer == 0,
            last_inner=outer == self.outer - 1,
            active=True,
            full=full,
        )


class Sparse:
    """A list of pairs of blocks, per row of the batch."""

    def __init__(self, some: Array, whole: Array, *, inner_once: bool, listed: Array | None = None):
        """Plans the visits.

        Args:
          some, whole: bool, `b outer inner`: which pairs are met, and which of them are full.
          inner_once: each inner block is met, too, if only to write zeros.
          listed: bool, `b outer`: of the outer blocks, those that are met even then; all by default.

        Raises:
          NotImplementedError: there are more blocks than the list can hold.
        """
        rows, outer, inner = some.shape
        if rows * outer * inner > _MOST:
            raise NotImplementedError(
                f"attention: {rows} x {outer} x {inner} blocks under a mask; at most {_MOST} can be listed"
            )
        # Blocks that see nothing are met once all the same.
        idle = ~some.any(2, keepdims=True)
        if listed is not None:
            idle &= listed[:, :, None]
        met = some | ((_numbers(some.shape, 2) == 0) & idle)
        if inner_once:
            met |= (_numbers(some.shape, 1) == 0) & ~met.any(1, keepdims=True)
        flags = (
            _FIRST * _first(met, 2)
            + _LAST * _first(met[:, :, ::-1], 2)[:, :, ::-1]
            + _ACTIVE * some
            + _FULL * (some & whole)
            + _FIRST_INNER * _first(met, 1)
            + _LAST_INNER * _first(met[:, ::-1], 1)[:, ::-1]
        ).reshape(rows, -1)
        count = met.sum((1, 2))
        order = jnp.argsort(~met.reshape(rows, -1), axis=1, stable=True)
        position = _numbers(order.shape, 1)
        # Rows with fewer visits stay at their last, doing nothing.
        stay = jnp.minimum(position, count[:, None] - 1)
        where = jnp.take_along_axis(order, stay, axis=1)
        flags = jnp.where(position < count[:, None], jnp.take_along_axis(flags, where, axis=1), 0)
        blocks = ((where // inner) << 16) + where % inner
        self._length = count.max().astype(jnp.int32)
        self.prefetch = (blocks.astype(jnp.int32), _with_flushed(flags, where % inner))

    def grid(self, batch: int, groups: int) -> tuple[Any, ...]:
        return batch, groups, self._length

    def map(self, index: Callable[..., tuple]) -> Callable[..., tuple]:
        """As of `Dense`."""

        def mapped(batch, group, position, blocks, flags):
            row = batch if blocks.shape[0] > 1 else 0
            pair = blocks[row, position]
            return index(batch, group, pair >> 16, pair & 0xFFFF, flags[row, position] >> _FLAG_BITS)

        return mapped

    def visit(self, batch_axis: int, words: tuple[Any, ...]) -> Visit:
        """Within the kernel."""
        blocks, flags = words
        row = pl.program_id(batch_axis) if blocks.shape[0] > 1 else 0
        position = pl.program_id(batch_axis + 2)
        pair, bits = blocks[row, position], flags[row, position]
        has = lambda flag: (bits & flag) != 0  # noqa: E731
        return Visit(
            pair >> 16,
            pair & 0xFFFF,
            first=has(_FIRST),
            last=has(_LAST),
            first_inner=has(_FIRST_INNER),
            last_inner=has(_LAST_INNER),
            active=has(_ACTIVE),
            full=has(_FULL),
        )


def seen_blocks(
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
    *,
    queries: int,
    keys: int,
    query_block: int,
    key_block: int,
) -> Seen:
    """What masks leave of blocks of queries and keys.

    A block is left out where no code of its keys can be in a range of its queries, judged by the least and
    largest of both: tight where codes do not decrease along the sequence, as in packed rows and over frames.
    """
    shape = (-(-queries // query_block), -(-keys // key_block))
    some, whole = jnp.ones((1, *shape), bool), jnp.ones((1, *shape), bool)
    if keys % key_block:
        whole &= _numbers(whole.shape, 2) < shape[1] - 1
    if ranges is not None:
        largest = jnp.iinfo(jnp.int32).max
        codes, shown = ranges.codes, ranges.codes >= 0
        low_code = _blocks(jnp.where(shown, codes, largest), key_block, largest).min(-1)[:, None]
        high_code = _blocks(codes, key_block, -1).max(-1)[:, None]
        all_shown = _blocks(shown, key_block, True).all(-1)[:, None]
        seeing = ranges.high >= ranges.low
        low = _blocks(jnp.where(seeing, ranges.low, largest), query_block, largest)
        high = _blocks(jnp.where(seeing, ranges.high, -1), query_block, -1)
        some &= (low.min(-1)[:, :, None] <= high_code) & (low_code <= high.max(-1)[:, :, None])
        low, high = _blocks(ranges.low, query_block, 0), _blocks(ranges.high, query_block, largest)
        inside = (low.max(-1)[:, :, None] <= low_code) & (high_code <= high.min(-1)[:, :, None])
        whole = whole & inside & all_shown
    if block_mask is not None:
        rows = jnp.repeat(block_mask.blocks, block_mask.query_size // query_block, axis=0)[: shape[0]]
        some &= jnp.repeat(rows, block_mask.key_size // key_block, axis=1)[None, :, : shape[1]]
    return Seen(*jnp.broadcast_arrays(some, whole))


def _blocks(x: Array, size: int, fill: Any) -> Array:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return x.reshape(x.shape[0], -1, size)


def _numbers(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _first(met: Array, axis: int) -> Array:
    """Which is the first that is met along an axis."""
    return met & (jnp.cumsum(met, axis=axis) == 1)


def _with_flushed(flags: Array, inner: Array) -> Array:
    """Adds, above the flags, the inner block whose last visit is the next: its output leaves then."""

    def next_one(later, here):
        flag, block = here
        block = jnp.where(flag & _LAST_INNER != 0, block, later)
        return block, block

    last = jnp.zeros_like(inner[:, 0])
    # From the end: after the last visit that completes a block, that block stays.
    final = jnp.where(flags & _LAST_INNER != 0, _numbers(flags.shape, 1), -1).argmax(1)
    last = jnp.take_along_axis(inner, final[:, None], axis=1)[:, 0]
    _, flushed = jax.lax.scan(next_one, last, (flags.T, inner.T), reverse=True)
    return flags.astype(jnp.int32) + (flushed.T.astype(jnp.int32) << _FLAG_BITS)
