"""Attention's backward pass on a TPU, fused: one kernel computes the gradients of query, key and value.

Blocks of keys are the outer loop. Gradients of keys and values accumulate over one outer iteration. The
gradient of all queries stays in VMEM until the last block of keys, so that no partial sums go through HBM.
Scores are recomputed from the log-sum-exp (arXiv 2205.14135), transposed, keys by queries. On an MXU of
256 x 256 the gradients accumulate transposed too, channels first, which fills it; they are transposed back
when they are stored.
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
"""Bytes for register spills, and for blocks of masks and log-sum-exps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardKernel:
    """The backward kernel of one call.

    Attributes:
      queries, keys: numbers of tokens.
      scale: factor on the query-key products.
      transposed: accumulates gradients channels first.
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
        """Gradients of query, key, value; arrays are `b s (n k)`, `log_sum_exp` is `b groups heads s`."""
        schedule, blocks, heads = self.masking.schedule, self.blocks, self.heads
        tokens = functools.partial(self._spec, heads.lanes)
        of_queries = tokens(blocks.queries, lambda b, g, outer, inner, _: (b, inner, g))
        of_keys = tokens(blocks.keys, lambda b, g, outer, inner, _: (b, outer, g))
        # Stored after the last block of keys.
        of_d_query = tokens(blocks.queries, lambda b, g, outer, inner, output_block: (b, output_block, g))
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
                out_specs=[of_d_query, of_keys, of_keys],
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
        # In a loop XLA fuses a kernel with the update that stacks its results, and drops `vmem_bytes`.
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
    """One grid step: a block of keys with a block of queries."""

    def __init__(self, kernel: BackwardKernel, grid_step: GridStep, inputs, masks, gradients, scratch):
        self.kernel, self.grid_step = kernel, grid_step
        self.heads, self.blocks = kernel.heads, kernel.blocks
        self.query, self.key, self.value, self.output, self.log_sum_exp, self.cotangent = inputs
        self.masks = masks
        self.d_query, self.d_key, self.d_value = gradients
        self.of_query, self.of_key, self.of_value, self.mean, self.offset, *copies = scratch
        self.query_copy, self.cotangent_copy, self.key_copy, *filled_copies = copies
        self.filled_key, self.filled_value, self.codes = filled_copies
        # Reads beyond the end of a sequence are undefined. They are replaced with zeros, and keys for scores
        # with copies of a valid key, so that no padding score exceeds all valid ones.
        self.ragged_queries = kernel.queries % kernel.blocks.queries != 0
        self.ragged_keys = kernel.keys % kernel.blocks.keys != 0
        # Operands are copied only where the products cannot read them directly.
        self.copied_queries = self.ragged_queries or self.heads.paired
        self.copied_keys = self.ragged_keys or self.heads.paired

    # Before and after the products.

    def begin_keys(self) -> None:
        """Runs at the first step of a block of keys."""
        if self.copied_keys:
            count = self.kernel.keys - self.grid_step.outer * self.blocks.keys if self.ragged_keys else None
            self._copy(self.key, self.key_copy, count)
            if self.ragged_keys:
                self.filled_key[...] = filled(self.key[...], count, self.key[0:1])
                self.filled_value[...] = filled(self.value[...], count, 0)

    def clear_keys(self) -> None:
        """Zeros the sums of a block of keys whose first step is inactive and so does not overwrite them."""
        self.of_key[...] = jnp.zeros_like(self.of_key)
        self.of_value[...] = jnp.zeros_like(self.of_value)

    def clear_queries(self) -> None:
        """`clear_keys` for a block of queries."""
        self.of_query[self.grid_step.inner] = jnp.zeros_like(self.of_query[self.grid_step.inner])

    def finish_queries(self) -> None:
        """Stores the gradient of a block of queries after its last block of keys."""
        gradient = self.kernel.scale * self.of_query[self.grid_step.inner]
        self.d_query[...] = self._tokens_first(gradient.astype(self.d_query.dtype))

    def finish_keys(self) -> None:
        """Stores the gradients of a block of keys and values after its last block of queries."""
        self.d_key[...] = self._tokens_first((self.kernel.scale * self.of_key[...]).astype(self.d_key.dtype))
        self.d_value[...] = self._tokens_first(self.of_value[...].astype(self.d_value.dtype))

    def _tokens_first(self, x: Array) -> Array:
        return x.T if self.kernel.transposed else x

    def _query_count(self) -> Any:
        """Number of valid queries in the block (may exceed the block), or None if all blocks are full."""
        if not self.ragged_queries:
            return None
        return self.kernel.queries - self.grid_step.inner * self.blocks.queries

    @staticmethod
    def _valid(count: Any, shape: tuple[int, ...], axis: int) -> Array:
        """Mask of the first `count` indices along `axis`; all True if `count` is None."""
        if count is None:
            return jnp.ones(shape, bool)
        return lax.broadcasted_iota(jnp.int32, shape, axis) < count

    def _copy(self, block, copies, count: Any) -> None:
        """Copies a block once per head, with the other head's channels zero, for products over all channels.

        Args:
          count: number of valid tokens in the block, or None for all.
        """
        for head in range(self.heads.together):
            tokens = block[:, self.heads.window(head)]
            valid = self._valid(count, tokens.shape, 0)
            if self.heads.paired:
                valid &= self.heads.own(head, tokens.shape, 1)
            copies[head] = jnp.where(valid, tokens, 0)

    # Products.

    def absorb(self, *, masked: bool) -> None:
        """Adds the gradients of all units of this pair of blocks."""
        blocks = self.blocks
        logarithm = self.log_sum_exp[...] * LOG2_E
        seen = logarithm > NEGATIVE
        seen &= self._valid(self._query_count(), logarithm.shape, 1)
        # The offset makes every weight zero for a query that sees no key, and for a padding query.
        offset = jnp.where(seen, logarithm, -NEGATIVE)
        for head in range(self.heads.together):
            self.offset[head] = offset[head : head + 1]
        if self.copied_queries:
            self._copy(self.query, self.query_copy, self._query_count())
            self._copy(self.cotangent, self.cotangent_copy, self._query_count())
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

    def _queries_of(self, head: int, queries: slice) -> tuple[Array, Array]:
        """Query and cotangent of one head for a slice of queries."""
        if self.copied_queries:
            return self.query_copy[head, queries, :], self.cotangent_copy[head, queries, :]
        window = self.heads.window(head)
        return self.query[queries, window], self.cotangent[queries, window]

    def _products(self, unit) -> tuple[Array, Array]:
        head, queries, keys = unit
        if keys.start == 0 and self._begins(head):
            self._take_means(head, queries)
        query, cotangent = self._queries_of(head, queries)
        window = self.heads.window(head)
        # The copies of query and cotangent already zero the other head's channels.
        refs = (self.filled_key, self.filled_value) if self.ragged_keys else (self.key, self.value)
        key, value = (x[keys, window] for x in refs)
        return dot(key, query, (1, 1)), dot(value, cotangent, (1, 1))

    def _take_means(self, head: int, queries: slice) -> None:
        """Stores the dot products of output and cotangent, for a head or for both heads of a pair.

        Recomputed for each pair of blocks: in parallel with the matrix products it is almost free, at the
        first step of an outer block it would be expensive.
        """
        heads, window = self.heads, self.heads.window(head)
        output, cotangent = (x[queries, window].astype(jnp.float32) for x in (self.output, self.cotangent))
        product = (output * cotangent).T
        for index in range(heads.width // heads.padded):
            mean = product[heads.rows(index)].sum(0, keepdims=True)
            count = self._query_count()
            valid = self._valid(None if count is None else count - queries.start, mean.shape, 1)
            self.mean[head + index, :, queries] = jnp.where(valid, mean, 0)

    def _weights(self, masked: bool, unit, products: tuple[Array, Array]) -> tuple[Array, Array]:
        """Weights, and the gradient of the scores without the scale, in the dtype of the inputs."""
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
        key = self.key_copy[head, keys, :] if self.copied_keys else self.key[keys, window]
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
        """Whether `head` is the first to add to its window: the first head of a pair, or unpaired."""
        return head * self.heads.padded == self.heads.window(head).start

    def _product(self, tokens: Array, weights: Array, contracted: tuple[int, int]) -> Array:
        """Product of tokens, `n width`, and weights: `width m` if transposed, else `m width`."""
        if self.kernel.transposed:
            return dot(tokens, weights, contracted)
        return dot(weights, tokens, (contracted[1], contracted[0]))

    @staticmethod
    def _sum(total, where, first: Any, added: Array) -> None:
        """Adds to `total[where]`, or overwrites it if `first`, because scratch holds stale values."""
        total[where] = added + (total[where] if first is False else jnp.where(first, 0.0, total[where]))


def fitting(query: Array, blocks: BlockSizes, vmem_bytes: int, multiple: int, most: int) -> tuple[Heads, int]:
    """Heads per block and queries per kernel call, such that the gradient of those queries fits into VMEM.

    Args:
      blocks: block sizes; `blocks.heads` is the most heads per block.
      multiple: a part's number of queries is a multiple of this, unless one part holds all queries.
      most: most queries per call, regardless of VMEM.

    Returns:
      As many heads as fit with all queries; else one head, and the size of the fewest equal parts that fit.
      If `most` is less than all queries, the fewest equal parts that it allows take the place of all.

    Raises:
      NotImplementedError: not even one block of queries fits; or as `Heads.of`.
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
        f"{vmem_bytes >> 20} MiB of VMEM; pass smaller blocks"
    )


def equal_part(length: int, multiple: int, most: int) -> int:
    """Tokens per part for the fewest equal parts of at most `most`: `length`, or a multiple of `multiple`.

    Raises:
      NotImplementedError: `most` is less than both `multiple` and `length`.
    """
    if length <= most:
        return length
    units, at_once = -(-length // multiple), most // multiple
    if not at_once:
        raise NotImplementedError(
            f"attention: {length} queries and all keys are too many blocks to list under a mask: a part may "
            f"have at most {most} queries, and a block has {multiple}"
        )
    return -(-units // -(-units // at_once)) * multiple


def _vmem_needed(heads: Heads, blocks: BlockSizes, queries: int, dtype: Any) -> int:
    """Approximate bytes of VMEM: scratch, double-buffered blocks of inputs and outputs, and spills."""
    scratch = _scratch(heads, blocks, queries, dtype, transposed=False)
    scratch_bytes = sum(_padded_bytes(one.shape, one.dtype) for one in scratch)
    block_bytes = (4 * blocks.queries + 4 * blocks.keys) * heads.lanes * jnp.dtype(dtype).itemsize
    return scratch_bytes + 2 * block_bytes + _SPILLS


def _scratch(heads: Heads, blocks: BlockSizes, queries: int, dtype: Any, transposed: bool) -> list[Any]:
    """Scratch buffers of the kernel, in the order in which `_Step` unpacks them."""
    count = -(-queries // blocks.queries)
    shape = lambda size: (heads.lanes, size) if transposed else (size, heads.lanes)  # noqa: E731
    per_head = lambda size: pltpu.VMEM((heads.together, size, heads.width), dtype)  # noqa: E731
    return [
        pltpu.VMEM((count, *shape(blocks.queries)), jnp.float32),
        pltpu.VMEM(shape(blocks.keys), jnp.float32),
        pltpu.VMEM(shape(blocks.keys), jnp.float32),
        pltpu.VMEM((heads.together, 1, blocks.queries), jnp.float32),
        pltpu.VMEM((heads.together, 1, blocks.queries), jnp.float32),
        per_head(blocks.queries),
        per_head(blocks.queries),
        per_head(blocks.keys),
        pltpu.VMEM((blocks.keys, heads.lanes), dtype),
        pltpu.VMEM((blocks.keys, heads.lanes), dtype),
        pltpu.VMEM((blocks.keys, LANES), jnp.int32),
    ]


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array padded to tiles of 8 sublanes of 32 bits by 128 lanes."""
    *outer, rows, lanes = shape
    size = jnp.dtype(dtype).itemsize
    tile = 8 * 4 // size
    return math.prod(outer) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * size
