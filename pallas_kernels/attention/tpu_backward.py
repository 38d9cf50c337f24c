"""Attention's backward pass on a TPU, fused: one kernel gives the gradients of query, key and value.

Blocks of keys are the outer loop. The gradients of keys and values are summed while a block of keys is there;
that of the queries is kept in vector memory, for all queries, until the last block of keys has been met, so
that no partial sums travel. Scores are computed anew from the log-sum-exp (arXiv 2205.14135), transposed,
keys by queries. Where the MXU is 256 x 256 the gradients are summed transposed too, channels first, which
fills it; they are turned as they leave.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .block_schedule import GridStep
from .pipeline import pipelined
from .specs import BlockSizes
from .tpu_layout import (
    LANES,
    LOG2_E,
    NEGATIVE,
    Heads,
    Masking,
    dot,
    filled,
    visible,
)

__all__ = ["BackwardKernel", "equal_part", "fitting"]

_SPILLS = 8 << 20
"""Bytes for what does not fit into registers, and rows of masks and of log-sum-exps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardKernel:
    """The kernel of one call.

    Attributes:
      queries, keys: tokens.
      scale: of the products.
      transposed: gradients are summed channels first.
    """

    heads: Heads
    blocks: BlockSizes
    masking: Masking
    queries: int
    keys: int
    scale: float
    transposed: bool

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        output: Array,
        log_sum_exp: Array,
        cotangent: Array,
        *,
        vmem_bytes: int,
        interpret: Any = False,
    ) -> tuple[Array, Array, Array]:
        """Gradients of query, key and value; all are `b s (n k)`, but `log_sum_exp`: `b groups heads s`."""
        schedule, blocks, heads = self.masking.schedule, self.blocks, self.heads
        tokens = functools.partial(self._spec, heads.lanes)
        of_queries = tokens(blocks.queries, lambda b, g, outer, inner, _: (b, inner, g))
        of_keys = tokens(blocks.keys, lambda b, g, outer, inner, _: (b, outer, g))
        # Leaves when all blocks of keys have been met.
        leaving = tokens(blocks.queries, lambda b, g, outer, inner, output_block: (b, output_block, g))
        of_rows = pl.BlockSpec(
            (None, None, heads.together, blocks.queries),
            schedule.map(lambda b, g, outer, inner, _: (b, g, 0, inner)),
        )
        batch = query.shape[0]
        grid = schedule.grid(batch, heads.groups)
        arrays = (query, key, value, output, log_sum_exp, cotangent, query, key, value)
        gradients = pl.pallas_call(
            self._body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(schedule.prefetch),
                grid=grid,
                in_specs=[
                    *(of_queries, of_keys, of_keys, of_queries, of_rows, of_queries),
                    *self.masking.specs(blocks, queries_outside=False),
                ],
                out_specs=[leaving, of_keys, of_keys],
                scratch_shapes=_scratch(heads, blocks, self.queries, query.dtype, self.transposed),
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2),
                disable_bounds_checks=True,
                vmem_limit_bytes=vmem_bytes,
            ),
            cost_estimate=heads.cost(arrays, 5, batch=batch, scores=self.queries * self.keys),
            name="attention_backward",
            interpret=interpret,
        )(
            *schedule.prefetch,
            query,
            key,
            value,
            output,
            log_sum_exp,
            cotangent,
            *self.masking.arrays,
        )
        # In a loop XLA fuses a kernel with what puts its results into a stack, and forgets its `vmem_bytes`.
        return lax.optimization_barrier(gradients)

    def _spec(self, lanes: int, size: int, index) -> pl.BlockSpec:
        return pl.BlockSpec((None, size, lanes), self.masking.schedule.map(index))

    def _body(self, *refs: Any) -> None:
        count = len(self.masking.schedule.prefetch)
        words, refs = refs[:count], refs[count:]
        inputs, refs = refs[:6], refs[6:]
        masks, refs = refs[: len(self.masking.arrays)], refs[len(self.masking.arrays) :]
        grid_step = self.masking.schedule.current_step(0, words)
        step = _Step(self, grid_step, inputs, (*masks, None, None)[:3], refs[:3], refs[3:])
        pl.when(grid_step.first)(step.begin_keys)
        if not isinstance(grid_step.active, bool):
            idle = jnp.logical_not(grid_step.active)
            pl.when(grid_step.first & idle)(step.clear_keys)
            pl.when(grid_step.first_inner & idle)(step.clear_queries)
        if not masks:
            pl.when(grid_step.active)(lambda: step.absorb(masked=False))
        else:
            pl.when(grid_step.active & grid_step.full)(lambda: step.absorb(masked=False))
            pl.when(grid_step.active & jnp.logical_not(grid_step.full))(lambda: step.absorb(masked=True))
        pl.when(grid_step.last_inner)(step.finish_queries)
        pl.when(grid_step.last)(step.finish_keys)


class _Step:
    """One block of keys meets one of queries."""

    def __init__(self, kernel: BackwardKernel, grid_step: GridStep, inputs, masks, gradients, scratch):
        self.kernel, self.grid_step = kernel, grid_step
        self.heads, self.blocks = kernel.heads, kernel.blocks
        self.query, self.key, self.value, self.output, self.log_sum_exp, self.cotangent = inputs
        self.masks = masks
        self.d_query, self.d_key, self.d_value = gradients
        self.of_query, self.of_key, self.of_value, self.mean, self.offset, *own = scratch
        self.own_query, self.own_cotangent, self.own_key, self.whole_key, self.whole_value, self.codes = own
        # What is read beyond the end of a sequence may be anything, and is made zero; but for keys whose
        # scores are computed, which are made copies of one: no score is then larger than the others.
        self.ragged_queries = kernel.queries % kernel.blocks.queries != 0
        self.ragged_keys = kernel.keys % kernel.blocks.keys != 0
        # The operands are copied only where they are not what the products need.
        self.copied_queries = self.ragged_queries or self.heads.paired
        self.copied_keys = self.ragged_keys or self.heads.paired

    # What lies before and after the products.

    def begin_keys(self) -> None:
        """A block of keys is met for the first time."""
        if self.copied_keys:
            left = self.kernel.keys - self.grid_step.outer * self.blocks.keys if self.ragged_keys else None
            self._copy(self.key, self.own_key, left)
            if self.ragged_keys:
                self.whole_key[...] = filled(self.key[...], left, self.key[0:1])
                self.whole_value[...] = filled(self.value[...], left, 0)

    def clear_keys(self) -> None:
        """Nothing is added at the first grid_step, which would else replace what is there."""
        self.of_key[...] = jnp.zeros_like(self.of_key)
        self.of_value[...] = jnp.zeros_like(self.of_value)

    def clear_queries(self) -> None:
        """As `clear_keys`."""
        self.of_query[self.grid_step.inner] = jnp.zeros_like(self.of_query[self.grid_step.inner])

    def finish_queries(self) -> None:
        """A block of queries has met all its keys."""
        gradient = self.kernel.scale * self.of_query[self.grid_step.inner]
        self.d_query[...] = self._turned(gradient.astype(self.d_query.dtype))

    def finish_keys(self) -> None:
        """A block of keys has met all its queries."""
        self.d_key[...] = self._turned((self.kernel.scale * self.of_key[...]).astype(self.d_key.dtype))
        self.d_value[...] = self._turned(self.of_value[...].astype(self.d_value.dtype))

    def _turned(self, x: Array) -> Array:
        return x.T if self.kernel.transposed else x

    def _queries_left(self) -> Any:
        """How many queries of the block there are, or None for all of them."""
        if not self.ragged_queries:
            return None
        return self.kernel.queries - self.grid_step.inner * self.blocks.queries

    @staticmethod
    def _valid(left: Any, shape: tuple[int, ...], axis: int) -> Array:
        if left is None:
            return jnp.ones(shape, bool)
        return lax.broadcasted_iota(jnp.int32, shape, axis) < left

    def _copy(self, block, own, left: Any) -> None:
        """A block for each head, the other heads' channels zero: products over all channels then serve.

        Args:
          left: tokens of the block that there are, or None for all of them.
        """
        for head in range(self.heads.together):
            tokens = block[:, self.heads.window(head)]
            keep = self._valid(left, tokens.shape, 0)
            if self.heads.paired:
                keep &= self.heads.own(head, tokens.shape, 1)
            own[head] = jnp.where(keep, tokens, 0)

    # Products.

    def absorb(self, *, masked: bool) -> None:
        """All units of this pair of blocks."""
        blocks = self.blocks
        logarithm = self.log_sum_exp[...] * LOG2_E
        seen = logarithm > NEGATIVE
        seen &= self._valid(self._queries_left(), logarithm.shape, 1)
        # Of a query that sees nothing, or is none, every weight is zero.
        offset = jnp.where(seen, logarithm, -NEGATIVE)
        for head in range(self.heads.together):
            self.offset[head] = offset[head : head + 1]
        if self.copied_queries:
            self._copy(self.query, self.own_query, self._queries_left())
            self._copy(self.cotangent, self.own_cotangent, self._queries_left())
        if masked:
            self.codes[...] = jnp.broadcast_to(self.masks[0][...], (LANES, blocks.keys)).T
        pipelined(
            blocks.units(self.heads.together),
            self._products,
            functools.partial(self._weights, masked),
            self._add,
            ahead=blocks.ahead,
            lag=blocks.lag,
        )

    def _queries_of(self, head: int, rows: slice) -> tuple[Array, Array]:
        """Query and cotangent."""
        if self.copied_queries:
            return self.own_query[head, rows, :], self.own_cotangent[head, rows, :]
        window = self.heads.window(head)
        return self.query[rows, window], self.cotangent[rows, window]

    def _products(self, unit) -> tuple[Array, Array]:
        head, queries, keys = unit
        if keys.start == 0 and self._begins(head):
            self._take_means(head, queries)
        query, cotangent = self._queries_of(head, queries)
        window = self.heads.window(head)
        # The other head's channels are zero in the query already.
        whole = (self.whole_key, self.whole_value) if self.ragged_keys else (self.key, self.value)
        key, value = (x[keys, window] for x in whole)
        return dot(key, query, (1, 1)), dot(value, cotangent, (1, 1))

    def _take_means(self, head: int, queries: slice) -> None:
        """The products of output and cotangent, of a head or of both of a pair.

        For each pair of blocks again: beside the products it takes next to no time, and at the start of a row
        a lot.
        """
        heads, window = self.heads, self.heads.window(head)
        output, cotangent = (x[queries, window].astype(jnp.float32) for x in (self.output, self.cotangent))
        product = (output * cotangent).T
        for index in range(heads.width // heads.padded):
            mean = product[heads.rows(index)].sum(0, keepdims=True)
            left = self._queries_left()
            there = self._valid(None if left is None else left - queries.start, mean.shape, 1)
            self.mean[head + index, :, queries] = jnp.where(there, mean, 0)

    def _weights(self, masked: bool, unit, products: tuple[Array, Array]) -> tuple[Array, Array]:
        """Weights, and the gradient of the scores but for the scale, in the dtype of the inputs."""
        head, queries, keys = unit
        scores, of_weights = products
        scores = scores * (self.kernel.scale * LOG2_E)
        if masked:
            _, low, high = self.masks
            high = None if high is None else high[0:1, queries]
            mask = visible(self.codes[keys, :], low[0:1, queries], high, scores.shape)
            scores = jnp.where(mask, scores, NEGATIVE)
        weights = jnp.exp2(scores - self.offset[head, :, queries])
        of_scores = weights * (of_weights - self.mean[head, :, queries])
        return weights.astype(self.value.dtype), of_scores.astype(self.query.dtype)

    def _add(self, unit, transformed: tuple[Array, Array]) -> None:
        (head, queries, keys), (weights, of_scores) = unit, transformed
        query, cotangent = self._queries_of(head, queries)
        window = self.heads.window(head)
        key = self.own_key[head, keys, :] if self.copied_keys else self.key[keys, window]
        first = self.grid_step.first if queries.start == 0 and self._begins(head) else False
        first_inner = self.grid_step.first_inner if keys.start == 0 and self._begins(head) else False
        at_keys, at_queries = (window, keys), (window, queries)
        if not self.kernel.transposed:
            at_keys, at_queries = at_keys[::-1], at_queries[::-1]
        self._sum(self.of_value, at_keys, first, self._product(cotangent, weights, (0, 1)))
        self._sum(self.of_key, at_keys, first, self._product(query, of_scores, (0, 1)))
        at_queries = (self.grid_step.inner, *at_queries)
        self._sum(self.of_query, at_queries, first_inner, self._product(key, of_scores, (0, 0)))

    def _begins(self, head: int) -> bool:
        """Nothing has been added to the head's window: it is the first of a pair, or no pair."""
        return head * self.heads.padded == self.heads.window(head).start

    def _product(self, tokens: Array, weights: Array, contracted: tuple[int, int]) -> Array:
        """Of tokens, `n width`, and weights: `width m`, or `m width`."""
        if self.kernel.transposed:
            return dot(tokens, weights, contracted)
        return dot(weights, tokens, (contracted[1], contracted[0]))

    @staticmethod
    def _sum(total, where, first: Any, added: Array) -> None:
        """Adds; where it is the first, in place of what is there from before."""
        total[where] = added + (total[where] if first is False else jnp.where(first, 0.0, total[where]))


def fitting(query: Array, blocks: BlockSizes, vmem_bytes: int, multiple: int, most: int) -> tuple[Heads, int]:
    """What fits into vector memory: heads at once, and queries at once, of which the gradient is kept there.

    Args:
      blocks: whose `heads` are the most at once.
      multiple: of which queries are taken, if they are not taken all at once.
      most: queries at once, whatever fits.

    Returns:
      As many heads as fit with all queries; or one, and as many queries as make the fewest, equal parts.
      Where `most` is less than all queries, the fewest parts that it allows stand for all.

    Raises:
      NotImplementedError: not even one block of queries fits; or as of `Heads.of`.
    """
    queries = equal_part(query.shape[1], multiple, most)

    def fits(heads: Heads, at_once: int) -> bool:
        return _vmem_needed(heads, blocks, at_once, query.dtype) <= vmem_bytes

    for at_once in range(blocks.heads, 0, -1):
        if fits(heads := Heads.of(query, at_once), queries):
            return heads, queries
    heads, units = Heads.of(query), -(-query.shape[1] // multiple)
    for parts in range(-(-query.shape[1] // queries) + 1, units + 1):
        if fits(heads, size := -(-units // parts) * multiple):
            return heads, size
    raise NotImplementedError(
        f"attention: the gradient of {multiple} queries, float32 in {heads.width} lanes, does not fit into "
        f"{vmem_bytes >> 20} MiB of vector memory; give smaller blocks"
    )


def equal_part(length: int, multiple: int, most: int) -> int:
    """Tokens of the fewest equal parts with at most `most`: all, or a multiple.

    Raises:
      NotImplementedError: `most` is less than the multiple, and than all.
    """
    if length <= most:
        return length
    units, at_once = -(-length // multiple), most // multiple
    if not at_once:
        raise NotImplementedError(
            f"attention: more than {most} queries and all keys are too many blocks to list under a mask; "
            f"a block has {multiple} queries"
        )
    return -(-units // -(-units // at_once)) * multiple


def _vmem_needed(heads: Heads, blocks: BlockSizes, queries: int, dtype: Any) -> int:
    """Bytes, about: what is kept, blocks twice (the next ones arrive while one is met), and spills."""
    scratch = _scratch(heads, blocks, queries, dtype, transposed=False)
    kept = sum(_padded_bytes(one.shape, one.dtype) for one in scratch)
    travelling = (4 * blocks.queries + 4 * blocks.keys) * heads.lanes * jnp.dtype(dtype).itemsize
    return kept + 2 * travelling + _SPILLS


def _scratch(heads: Heads, blocks: BlockSizes, queries: int, dtype: Any, transposed: bool) -> list[Any]:
    """What the kernel keeps."""
    count = -(-queries // blocks.queries)
    turn = lambda size: (heads.lanes, size) if transposed else (size, heads.lanes)  # noqa: E731
    own = lambda size: pltpu.VMEM((heads.together, size, heads.width), dtype)  # noqa: E731
    return [
        pltpu.VMEM((count, *turn(blocks.queries)), jnp.float32),
        pltpu.VMEM(turn(blocks.keys), jnp.float32),
        pltpu.VMEM(turn(blocks.keys), jnp.float32),
        pltpu.VMEM((heads.together, 1, blocks.queries), jnp.float32),
        pltpu.VMEM((heads.together, 1, blocks.queries), jnp.float32),
        own(blocks.queries),
        own(blocks.queries),
        own(blocks.keys),
        pltpu.VMEM((blocks.keys, heads.lanes), dtype),
        pltpu.VMEM((blocks.keys, heads.lanes), dtype),
        pltpu.VMEM((blocks.keys, LANES), jnp.int32),
    ]


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Of an array in tiles of 8 sublanes, of 32 bits, by 128 lanes."""
    *outer, rows, lanes = shape
    size = jnp.dtype(dtype).itemsize
    tile = 8 * 4 // size
    return math.prod(outer) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * size
