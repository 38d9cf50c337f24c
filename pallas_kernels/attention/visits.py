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

from .masks import BlockMask, KeyRanges

__all__ = ["Dense", "Seen", "Sparse", "Visit", "most_listed", "seen_blocks"]

_FIRST, _LAST, _ACTIVE, _FULL, _FIRST_INNER, _LAST_INNER = (1 << bit for bit in range(6))
_FLAG_BITS = 6
_MOST = 1 << 17
"""Visits of all rows together; their two words each lie in scalar memory."""
_INNER_BITS = 13
_MOST_INNER = 1 << _INNER_BITS
_MOST_OUTER = 1 << 15


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
    """All pairs of blocks."""

    outer: int
    inner: int

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
        return Visit(
            outer,
            inner,
            first=inner == 0,
            last=inner == self.inner - 1,
            first_inner=outer == 0,
            last_inner=outer == self.outer - 1,
            active=True,
            full=True,
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
        if inner > _MOST_INNER or outer > most_listed(rows, inner):
            raise NotImplementedError(
                f"attention: {rows} x {outer} x {inner} blocks under a mask; at most {_MOST} can be listed, "
                f"{_MOST_INNER} of them in a row"
            )
        # Few operations, of whole tables: each costs a TPU about a microsecond, however small.
        number, of_outer = _numbers(some.shape, 2), _numbers(some.shape, 1)
        # Blocks that see nothing are met once all the same.
        idle = ~some.any(2, keepdims=True)
        if listed is not None:
            idle &= listed[:, :, None]
        met = some | ((number == 0) & idle)
        flags = _ACTIVE * some + _FULL * (some & whole)
        if inner_once:
            met |= (of_outer == 0) & ~met.any(1, keepdims=True)
            first = jnp.where(met, of_outer, outer).min(1, keepdims=True)
            last = jnp.where(met, of_outer, -1).max(1, keepdims=True)
            flags += _FIRST_INNER * (of_outer == first) + _LAST_INNER * (of_outer == last)
        # What is met comes first, in order.
        shift = max(1, (inner - 1).bit_length())
        place = (of_outer << shift) + number
        words = jnp.where(met, (place << _FLAG_BITS) + flags, jnp.iinfo(jnp.int32).max)
        # Else XLA flattens all that the table is computed from, one by one.
        words = jax.lax.optimization_barrier(words)
        words = jax.lax.sort(words.reshape(rows, -1), dimension=1)
        count = met.sum((1, 2))
        there = _numbers(words.shape, 1) < count[:, None]
        # Rows with fewer visits stay at their last, doing nothing.
        stay = jnp.where(met, place, 0).max((1, 2))
        place = jnp.where(there, words >> _FLAG_BITS, stay[:, None])
        flags = jnp.where(there, words & ((1 << _FLAG_BITS) - 1), 0)
        outer_block, inner_block = place >> shift, place & ((1 << shift) - 1)
        change = outer_block[:, 1:] != outer_block[:, :-1]
        flags += there * _FIRST * jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
        # The last that there is may be followed by others of the same block, which do nothing.
        final = _numbers(words.shape, 1) == count[:, None] - 1
        flags += _LAST * (final | (there & jnp.pad(change, ((0, 0), (0, 1)))))
        self._length = count.max().astype(jnp.int32)
        if inner_once:
            flags += _flushed(flags, inner_block) << _FLAG_BITS
        self.prefetch = ((outer_block << 16) + inner_block, flags)

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


def most_listed(rows: int, others: int) -> int:
    """Blocks of one side that `Sparse` can list with so many of the other side; 0 where there is no room.

    Args:
      rows: of the batch, that lists are made for.
    """
    return min(_MOST // max(rows * others, 1), _MOST_OUTER)


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
        codes, low, high = ranges
        shown, seeing = codes >= 0, high >= low
        low_code, high_code, least_code = _extremes(
            key_block,
            (jnp.minimum, jnp.where(shown, codes, largest)),
            (jnp.maximum, codes),
            (jnp.minimum, codes),
        )
        least_low, most_high, most_low, least_high = _extremes(
            query_block,
            (jnp.minimum, jnp.where(seeing, low, largest)),
            (jnp.maximum, jnp.where(seeing, high, -1)),
            (jnp.maximum, low),
            (jnp.minimum, high),
        )
        of_keys, of_queries = (lambda x: x[:, None, :]), (lambda x: x[:, :, None])
        some &= of_queries(least_low) <= of_keys(high_code)
        some &= of_keys(low_code) <= of_queries(most_high)
        whole &= of_queries(most_low) <= of_keys(jnp.where(least_code < 0, -1, low_code))
        whole &= of_keys(high_code) <= of_queries(least_high)
    if block_mask is not None:
        rows = jnp.repeat(block_mask.blocks, block_mask.query_size // query_block, axis=0)[: shape[0]]
        some &= jnp.repeat(rows, block_mask.key_size // key_block, axis=1)[None, :, : shape[1]]
    return Seen(*jnp.broadcast_arrays(some, whole))


def _extremes(size: int, *of_arrays: tuple[Callable[..., Array], Array]) -> tuple[Array, ...]:
    """Of blocks of arrays, `b s`, each with `jnp.minimum` or `jnp.maximum`; one pass over all of them."""
    ends = {jnp.minimum: jnp.iinfo(jnp.int32).max, jnp.maximum: jnp.int32(-1)}
    operators, arrays = zip(*of_arrays, strict=True)
    initial = tuple(jnp.int32(ends[operator]) for operator in operators)
    blocks = tuple(
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=end).reshape(x.shape[0], -1, size)
        for x, end in zip(arrays, initial, strict=True)
    )
    combine = lambda xs, ys: tuple(f(x, y) for f, x, y in zip(operators, xs, ys, strict=True))  # noqa: E731
    return tuple(jax.lax.reduce(blocks, initial, combine, (2,)))


def _numbers(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _flushed(flags: Array, inner: Array) -> Array:
    """The inner block whose last visit is the next, or was the last: its output leaves then."""
    last = (flags & _LAST_INNER) != 0
    numbered = (_numbers(flags.shape, 1) << _INNER_BITS) + inner
    following = jax.lax.cummin(jnp.where(last, numbered, jnp.iinfo(jnp.int32).max), axis=1, reverse=True)
    final = jnp.where(last, numbered, 0).max(1, keepdims=True)
    return jnp.minimum(following, final) & ((1 << _INNER_BITS) - 1)
