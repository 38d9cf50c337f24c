"""Lists the blocks that the GPU kernels visit, so that pairs of blocks without a visible key cost nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from .masks import HIDDEN, BlockMask, KeyRanges

__all__ = ["Visits", "list_visits", "run"]

Carry = TypeVar("Carry")


class Visits(NamedTuple):
    """For each block of one side (queries or keys), the blocks of the other side in the order of visits.

    The batch axis is 1 if all examples have the same visits.

    Attributes:
      order: int32, `b i j`; fully visible blocks first, then partly visible ones, then the rest.
      counts: int32, `b i 2`; number of fully visible blocks, and of fully or partly visible ones.
    """

    order: Array
    counts: Array


def list_visits(
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
    *,
    queries: int,
    keys: int,
    query_block: int,
    key_block: int,
    of_keys: bool = False,
) -> Visits | None:
    """Visits of each block of queries, or of keys if `of_keys`; None visits everything.

    A block counts as visible if the interval of its codes meets the interval of the ranges. The order of
    codes in a sequence does not affect results, but fewer blocks are visited if equal codes are adjacent.
    """
    if ranges is None and block_mask is None:
        return None
    count = -(-queries // query_block), -(-keys // key_block)
    if ranges is None:
        seen = jnp.ones((1, *count), bool)
        inside = (jnp.arange(count[1]) + 1) * key_block <= keys
        whole = jnp.broadcast_to(inside[None, None], seen.shape)
    else:
        seen, whole = _compare(ranges, query_block, key_block)
    if block_mask is not None:
        rows = jnp.arange(count[0]) * query_block // block_mask.query_size
        columns = jnp.arange(count[1]) * key_block // block_mask.key_size
        allowed = block_mask.blocks[rows][:, columns][None]
        seen, whole = seen & allowed, whole & allowed
    if of_keys:
        # Queries beyond the end matter only here, where the kernel sums over queries.
        inside = (jnp.arange(count[0]) + 1) * query_block <= queries
        seen, whole = seen.swapaxes(1, 2), (whole & inside[None, :, None]).swapaxes(1, 2)
    rank = jnp.where(whole, 0, jnp.where(seen, 1, 2))
    return Visits(
        jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32),
        jnp.stack([whole.sum(-1), seen.sum(-1)], axis=-1).astype(jnp.int32),
    )


def _compare(ranges: KeyRanges, query_block: int, key_block: int) -> tuple[Array, Array]:
    """Whether each pair of blocks may be visible, and whether it is fully visible, both bool, `b i j`."""
    codes, (low, high) = ranges.codes, ranges.limits
    largest = jnp.iinfo(jnp.int32).max
    sees_any = low <= high
    first = _of_blocks(jnp.min, jnp.where(sees_any, low, largest), query_block, largest)
    last = _of_blocks(jnp.max, jnp.where(sees_any, high, HIDDEN), query_block, HIDDEN)
    least = _of_blocks(jnp.min, jnp.where(codes == HIDDEN, largest, codes), key_block, largest)
    most = _of_blocks(jnp.max, codes, key_block, HIDDEN)
    seen = (first[:, :, None] <= most[:, None]) & (least[:, None] <= last[:, :, None])
    # A hidden or padding key has a code below any `low`; padding queries do not matter here.
    least = _of_blocks(jnp.min, codes, key_block, HIDDEN)
    above = _of_blocks(jnp.max, low, query_block, HIDDEN)[:, :, None] <= least[:, None]
    below = most[:, None] <= _of_blocks(jnp.min, high, query_block, largest)[:, :, None]
    return seen, above & below


def _of_blocks(reduce: Callable[..., Array], x: Array, size: int, fill: int) -> Array:
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return reduce(padded.reshape(x.shape[0], -1, size), axis=-1)


def run(
    step: Callable[[Array | int, Carry, bool], Carry],
    carry: Carry,
    refs: dict[str, Any],
    whole: int,
    total: int,
) -> Carry:
    """Inside a kernel, calls `step(block, carry, masked)` for each visit and returns the last carry.

    Args:
      refs: if it holds `order` and `counts`, the visits of the program's block; otherwise all blocks are
        visited.
      whole: number of leading blocks that need no mask, without `order`.
      total: number of blocks, without `order`.
    """
    if "order" not in refs:
        if whole:
            carry = jax.lax.fori_loop(0, whole, lambda i, x: step(i, x, False), carry)
        return step(whole, carry, True) if whole < total else carry
    order, counts = refs["order"], refs["counts"]
    carry = jax.lax.fori_loop(0, counts[0], lambda i, x: step(order[i], x, False), carry)
    return jax.lax.fori_loop(counts[0], counts[1], lambda i, x: step(order[i], x, True), carry)
