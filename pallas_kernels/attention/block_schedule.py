"""Block schedules: the pairs of query and key blocks that a kernel computes, in order of its grid steps.

A kernel loops over outer blocks (queries in the forward pass, keys in the backward pass) and, for each,
over inner blocks. `Dense` schedules all pairs, at compile time. `Sparse` computes a list of pairs on the
device from the masks; the grid is as long as the list, so that empty pairs cost nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from .masks import BlockMask, KeyRanges

__all__ = ["BlockOccupancy", "Dense", "GridStep", "Sparse", "most_listed", "seen_blocks"]

_FIRST, _LAST, _ACTIVE, _FULL, _FIRST_INNER, _LAST_INNER = (1 << bit for bit in range(6))
_FLAG_BITS = 6
_MOST = 1 << 17
"""Most grid steps over the whole batch; each takes two words of scalar memory (SMEM)."""
_INNER_BITS = 13
_MOST_INNER = 1 << _INNER_BITS
_MOST_OUTER = 1 << 15


class GridStep(NamedTuple):
    """One step of a kernel's grid.

    Attributes:
      outer, inner: indices of the blocks.
      first, last: whether this is the first or last step of the outer block.
      first_inner, last_inner: whether this is the first or last step of the inner block.
      active: whether any query of the pair sees any key.
      full: whether every query sees every key, so that no mask is applied.
    """

    outer: Any
    inner: Any
    first: Any
    last: Any
    first_inner: Any
    last_inner: Any
    active: Any
    full: Any


class BlockOccupancy(NamedTuple):
    """Occupancy of each pair of a query block and a key block, bool, `b q k` (or `1 q k`).

    Attributes:
      any_visible: whether some query sees some key.
      all_visible: whether every query sees every key.
    """

    any_visible: Array
    all_visible: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """The schedule of all pairs of `outer` and `inner` blocks."""

    outer: int
    inner: int

    prefetch: tuple[Array, ...] = ()

    def grid(self, batch: int, groups: int) -> tuple[int, ...]:
        return batch, groups, self.outer, self.inner

    def map(self, index: Callable[..., tuple]) -> Callable[..., tuple]:
        """The index map of a `BlockSpec` from `index(batch, group, outer, inner, output_block)`."""

        def mapped(batch, group, outer, inner):
            output_block = jnp.where(outer == self.outer - 1, inner, 0)
            return index(batch, group, outer, inner, output_block)

        return mapped

    def current_step(self, batch_axis: int, words: tuple[Any, ...]) -> GridStep:
        """The grid step, read inside the kernel."""
        del words
        outer, inner = pl.program_id(batch_axis + 2), pl.program_id(batch_axis + 3)
        return GridStep(
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
    """A schedule that lists pairs of blocks for each example of the batch."""

    def __init__(
        self, any_visible: Array, all_visible: Array, *, inner_once: bool, required: Array | None = None
    ):
        """Computes the schedule.

        Args:
          any_visible, all_visible: bool, `b outer inner`, as in `BlockOccupancy`.
          inner_once: schedules each inner block at least once, if only to write zeros.
          required: bool, `b outer`: outer blocks to schedule even if they see nothing; None is all.

        Raises:
          NotImplementedError: there are more pairs of blocks than the list can hold.
        """
        rows, outer, inner = any_visible.shape
        if inner > _MOST_INNER or outer > most_listed(rows, inner):
            raise NotImplementedError(
                f"attention: {rows} x {outer} x {inner} blocks (batch x outer x inner) under a mask; at most "
                f"{_MOST} can be listed, with {_MOST_INNER} inner ones: use larger blocks or fewer tokens"
            )
        # As few operations as possible, on full tables: each takes a TPU about a microsecond, however small.
        number, of_outer = _numbers(any_visible.shape, 2), _numbers(any_visible.shape, 1)
        # An outer block that sees nothing gets one step, which writes its output.
        idle = ~any_visible.any(2, keepdims=True)
        if required is not None:
            idle &= required[:, :, None]
        scheduled = any_visible | ((number == 0) & idle)
        flags = _ACTIVE * any_visible + _FULL * (any_visible & all_visible)
        if inner_once:
            scheduled |= (of_outer == 0) & ~scheduled.any(1, keepdims=True)
            first = jnp.where(scheduled, of_outer, outer).min(1, keepdims=True)
            last = jnp.where(scheduled, of_outer, -1).max(1, keepdims=True)
            flags += _FIRST_INNER * (of_outer == first) + _LAST_INNER * (of_outer == last)
        # Scheduled pairs come first, in order.
        shift = max(1, (inner - 1).bit_length())
        place = (of_outer << shift) + number
        words = jnp.where(scheduled, (place << _FLAG_BITS) + flags, jnp.iinfo(jnp.int32).max)
        # Without the barrier XLA moves the reshape up and flattens every input of the table separately.
        words = jax.lax.optimization_barrier(words)
        words = jax.lax.sort(words.reshape(rows, -1), dimension=1)
        count = scheduled.sum((1, 2))
        is_step = _numbers(words.shape, 1) < count[:, None]
        # Examples with fewer steps repeat their last pair with no flags set: nothing is computed.
        last_place = jnp.where(scheduled, place, 0).max((1, 2))
        place = jnp.where(is_step, words >> _FLAG_BITS, last_place[:, None])
        flags = jnp.where(is_step, words & ((1 << _FLAG_BITS) - 1), 0)
        outer_block, inner_block = place >> shift, place & ((1 << shift) - 1)
        change = outer_block[:, 1:] != outer_block[:, :-1]
        flags += is_step * _FIRST * jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
        # An example's last step shows no change of block if repeats follow it.
        final = _numbers(words.shape, 1) == count[:, None] - 1
        flags += _LAST * (final | (is_step & jnp.pad(change, ((0, 0), (0, 1)))))
        self._length = count.max().astype(jnp.int32)
        if inner_once:
            flags += _output_blocks(flags, inner_block) << _FLAG_BITS
        self.prefetch = ((outer_block << 16) + inner_block, flags)

    def grid(self, batch: int, groups: int) -> tuple[Any, ...]:
        return batch, groups, self._length

    def map(self, index: Callable[..., tuple]) -> Callable[..., tuple]:
        """The index map of a `BlockSpec`, as in `Dense.map`."""

        def mapped(batch, group, position, blocks, flags):
            row = batch if blocks.shape[0] > 1 else 0
            pair = blocks[row, position]
            return index(batch, group, pair >> 16, pair & 0xFFFF, flags[row, position] >> _FLAG_BITS)

        return mapped

    def current_step(self, batch_axis: int, words: tuple[Any, ...]) -> GridStep:
        """The grid step, read inside the kernel."""
        blocks, flags = words
        row = pl.program_id(batch_axis) if blocks.shape[0] > 1 else 0
        position = pl.program_id(batch_axis + 2)
        pair, bits = blocks[row, position], flags[row, position]
        has = lambda flag: (bits & flag) != 0  # noqa: E731
        return GridStep(
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
    """Most blocks of one side that `Sparse` can list with `others` blocks of the other side; 0 if none.

    Args:
      rows: examples of the batch, each with a list.
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
) -> BlockOccupancy:
    """Occupancy of the pairs of blocks under the masks.

    A pair is empty if the interval of its keys' codes misses the interval of its queries' ranges. The test is
    tight where codes are nondecreasing along the sequence, as in packed rows and over frames.
    """
    shape = (-(-queries // query_block), -(-keys // key_block))
    any_visible, all_visible = jnp.ones((1, *shape), bool), jnp.ones((1, *shape), bool)
    if keys % key_block:
        all_visible &= _numbers(all_visible.shape, 2) < shape[1] - 1
    if ranges is not None:
        largest = jnp.iinfo(jnp.int32).max
        codes, (low, high) = ranges.codes, ranges.limits
        is_visible, sees_any = codes >= 0, high >= low
        low_code, high_code, least_code = _extremes(
            key_block,
            (jnp.minimum, jnp.where(is_visible, codes, largest)),
            (jnp.maximum, codes),
            (jnp.minimum, codes),
        )
        least_low, most_high, most_low, least_high = _extremes(
            query_block,
            (jnp.minimum, jnp.where(sees_any, low, largest)),
            (jnp.maximum, jnp.where(sees_any, high, -1)),
            (jnp.maximum, low),
            (jnp.minimum, high),
        )
        of_keys, of_queries = (lambda x: x[:, None, :]), (lambda x: x[:, :, None])
        any_visible &= of_queries(least_low) <= of_keys(high_code)
        any_visible &= of_keys(low_code) <= of_queries(most_high)
        all_visible &= of_queries(most_low) <= of_keys(jnp.where(least_code < 0, -1, low_code))
        all_visible &= of_keys(high_code) <= of_queries(least_high)
    if block_mask is not None:
        rows = jnp.repeat(block_mask.blocks, block_mask.query_size // query_block, axis=0)[: shape[0]]
        any_visible &= jnp.repeat(rows, block_mask.key_size // key_block, axis=1)[None, :, : shape[1]]
    return BlockOccupancy(*jnp.broadcast_arrays(any_visible, all_visible))


def _extremes(size: int, *of_arrays: tuple[Callable[..., Array], Array]) -> tuple[Array, ...]:
    """Minima or maxima over blocks of `size` of arrays `b s`; one pass over all arrays."""
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


def _output_blocks(flags: Array, inner: Array) -> Array:
    """The inner block whose output is written at each step: the next one to finish, else the last one."""
    last = (flags & _LAST_INNER) != 0
    numbered = (_numbers(flags.shape, 1) << _INNER_BITS) + inner
    following = jax.lax.cummin(jnp.where(last, numbered, jnp.iinfo(jnp.int32).max), axis=1, reverse=True)
    final = jnp.where(last, numbered, 0).max(1, keepdims=True)
    return jnp.minimum(following, final) & ((1 << _INNER_BITS) - 1)
