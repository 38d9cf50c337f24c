"""Attention's forward pass on a TPU.

Scores are transposed, keys by queries: softmax then reduces along sublanes, with elementwise operations only,
and the product with the values fills an MXU of 256 x 256 although a head has only 128 channels. The output is
transposed when it is stored.

A query's exponentials are relative to a reference instead of its largest score: float32 has a range of 2**127
either way. The reference starts as the largest score among a few keys, and is raised between blocks once the
sum exceeds 2**64, so that no maximum over the scores is needed. A query for which that fails (its sum
overflows within one block, or underflows) is marked by a log-sum-exp of NaN and recomputed by the exact
variant, which takes the largest score of every unit (online softmax, arXiv 1805.02867): see `tpu.forward`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .block_schedule import GridStep, Sparse
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

__all__ = ["ForwardKernel"]

_SAMPLE = 32
"""Number of keys for the initial reference: the first keys, whose products are ready first."""
_TOTALS = 16
"""Sublanes below the sums of the values, which hold the sums of the weights."""
_RAISE, _OVERFLOW, _UNDERFLOW = 2.0**64, 2.0**100, 2.0**-100
"""A query's sum of weights: above the first, its reference is raised; beyond the others, it is recomputed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKernel:
    """The forward kernel of one call.

    Attributes:
      queries, keys: numbers of tokens.
      scale: factor on the query-key products.
      ones: sums the weights in the matrix product, with rows of ones below the transposed values, which is
        free on an MXU of 256 x 256. Otherwise by additions, with eight sums per query. Both sum the rounded
        weights that multiply the values: a query that sees one key gets exactly that key's value.
      exact: takes the largest score of every unit.
    """

    heads: Heads
    blocks: BlockSizes
    masking: Masking
    queries: int
    keys: int
    scale: float
    ones: bool
    exact: bool = False

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        previous: tuple[Array, Array] | None = None,
        *,
        vmem_bytes: int,
        interpret: Any = False,
    ) -> tuple[Array, Array]:
        """Output, `b s (n k)` as the inputs, and log-sum-exp, `b groups heads s`.

        Args:
          previous: both results of an earlier call; only the scheduled blocks of queries are replaced.
        """
        schedule, blocks, heads = self.masking.schedule, self.blocks, self.heads
        batch = query.shape[0]
        of_queries = pl.BlockSpec(
            (None, blocks.queries, heads.lanes),
            schedule.map(lambda b, g, outer, inner, _: (b, outer, g)),
        )
        of_keys = pl.BlockSpec(
            (None, blocks.keys, heads.lanes), schedule.map(lambda b, g, outer, inner, _: (b, inner, g))
        )
        of_rows = pl.BlockSpec(
            (None, None, heads.together, blocks.queries),
            schedule.map(lambda b, g, outer, inner, _: (b, g, 0, outer)),
        )
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        shapes = (
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, heads.groups, heads.together, self.queries), jnp.float32),
        )
        mask_specs = self.masking.specs(blocks, queries_outside=True)
        inputs = (*schedule.prefetch, query, key, value, *self.masking.arrays)
        aliases = {} if previous is None else {len(inputs): 0, len(inputs) + 1: 1}
        grid = schedule.grid(batch, heads.groups)
        # The cost estimate assumes that the exact variant does not run.
        scores = 0 if self.exact else self.queries * self.keys
        return pl.pallas_call(
            functools.partial(self._body, previous is not None),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(schedule.prefetch),
                grid=grid,
                in_specs=[of_queries, of_keys, of_keys, *mask_specs, *[anywhere] * len(aliases)],
                out_specs=[of_queries, of_rows],
                scratch_shapes=[
                    pltpu.VMEM(self._query_copy_shape(), query.dtype),
                    pltpu.VMEM(self._key_copy_shape(), query.dtype),
                    pltpu.VMEM((heads.together, heads.padded + _TOTALS, blocks.keys), value.dtype),
                    pltpu.VMEM((heads.together, 8, blocks.queries), jnp.float32),
                    pltpu.VMEM((heads.together, heads.padded + _TOTALS, blocks.queries), jnp.float32),
                    pltpu.VMEM((blocks.keys, LANES), jnp.int32),
                ],
            ),
            out_shape=shapes,
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2),
                disable_bounds_checks=True,
                vmem_limit_bytes=vmem_bytes,
            ),
            cost_estimate=heads.cost((query, key, value, *shapes), 2, batch=batch, scores=scores),
            name="attention_forward_exact" if self.exact else "attention_forward",
            interpret=interpret,
        )(*inputs, *(previous or ()))

    def _query_copy_shape(self) -> tuple[int, int, int]:
        """Shape of the copies of a block of queries, channels first, one per head; minimal if unpaired."""
        blocks, heads = self.blocks, self.heads
        return (heads.together, LANES, blocks.queries) if heads.paired else (1, 8, LANES)

    @property
    def ragged(self) -> bool:
        """Whether the last block of keys is partial; reads beyond the end are undefined."""
        return self.keys % self.blocks.keys != 0

    def _key_copy_shape(self) -> tuple[int, int]:
        """Shape of the copy of a block of keys; minimal if no copy is needed."""
        return (self.blocks.keys, self.heads.lanes) if self.ragged else (8, LANES)

    def _body(self, has_previous: bool, *refs: Any) -> None:
        count = len(self.masking.schedule.prefetch)
        words, refs = refs[:count], refs[count:]
        (query, key, value), refs = refs[:3], refs[3:]
        masks, refs = refs[: len(self.masking.arrays)], refs[len(self.masking.arrays) :]
        refs = refs[2:] if has_previous else refs
        results, scratch = refs[:2], refs[2:]
        grid_step = self.masking.schedule.current_step(0, words)
        step = _Step(self, grid_step, (query, key, value), (*masks, None, None)[:3], results, scratch)
        # Under masks an outer block has few steps: a separate body overlaps its start and end with products.
        ending: Any = False
        if isinstance(self.masking.schedule, Sparse) and not self.exact:
            ending = grid_step.full & grid_step.last
        others = lambda condition: condition if ending is False else condition & jnp.logical_not(ending)  # noqa: E731
        pl.when(others(grid_step.first))(step.begin)
        pl.when(ending)(lambda: step.absorb(ending=True))
        if not masks:
            pl.when(others(grid_step.active))(step.absorb)
        else:
            pl.when(others(grid_step.active & grid_step.full))(step.absorb)
            pl.when(grid_step.active & jnp.logical_not(grid_step.full))(lambda: step.absorb(masked=True))
        pl.when(others(grid_step.last & grid_step.active))(step.finish)
        if not isinstance(grid_step.active, bool):
            pl.when(grid_step.last & jnp.logical_not(grid_step.active))(step.write_zeros)


class _Step:
    """One grid step: a block of queries with a block of keys."""

    def __init__(self, kernel: ForwardKernel, grid_step: GridStep, inputs, masks, results, scratch):
        self.kernel, self.grid_step = kernel, grid_step
        self.heads, self.blocks = kernel.heads, kernel.blocks
        self.factor = kernel.scale * LOG2_E
        self.query, self.key, self.value = inputs
        self.masks = masks
        self.means: dict[Any, list[Array]] = {}
        self.output, self.log_sum_exp = results
        self.query_copy, self.key_copy, self.value_t, self.reference, self.sums, self.codes = scratch
        self.channels = slice(0, self.heads.padded)
        self.totals = slice(self.heads.padded, self.heads.padded + (1 if kernel.ones else 8))

    def begin(self) -> None:
        """Runs before the first block of keys."""
        for head in range(self.heads.together):
            self._copy_queries(head, slice(None))

    def _copy_queries(self, head: int, queries: slice) -> None:
        """Copies queries of one head of a pair, channels first, with the other head's channels zero."""
        if self.heads.paired:
            pair = self.query[queries, self.heads.window(head)].T
            self.query_copy[head, :, queries] = jnp.where(self.heads.own(head, pair.shape, 0), pair, 0)

    def absorb(self, *, masked: bool = False, ending: bool = False) -> None:
        """Adds the weighted values of all units of this pair of blocks.

        Args:
          masked: whether some query does not see some key.
          ending: whether this is the last step of the outer block (it may be the first too): then each unit
            of queries is started and finished in parallel with the products of other units.
        """
        blocks, heads = self.blocks, self.heads
        values = self.value[...].T
        ones = jnp.ones((_TOTALS, blocks.keys), jnp.float32)
        if self.kernel.ragged:
            # Padding holds copies of a valid key, whose scores cannot overflow, with values of zero.
            values, ones = (filled(x, self._key_count(), 0, axis=1) for x in (values, ones))
            self.key_copy[...] = filled(self.key[...], self._key_count(), self.key[0:1])
        for head in range(heads.together):
            self.value_t[head, self.channels] = values[heads.rows(head)]
            self.value_t[head, heads.padded :] = ones.astype(values.dtype)
        if masked:
            self.codes[...] = jnp.broadcast_to(self.masks[0][...], (LANES, blocks.keys)).T
        pipelined(
            blocks.units(heads.together),
            functools.partial(self._scores, ending),
            functools.partial(self._weights, masked),
            functools.partial(self._add, ending),
            ahead=blocks.ahead,
            lag=blocks.lag,
        )
        if not self.kernel.exact:
            totals = self.sums[:, self.totals]
            # A padding query may be NaN: the comparison keeps NaN out of the maximum.
            pl.when(jnp.max(jnp.where(totals > _RAISE, totals, 0.0)) > 0.0)(self._raise)

    def _scores(self, ending: bool, unit) -> Array:
        head, queries, keys = unit
        if ending and keys.start == 0:
            self._copy_queries(head, queries)
        key = self.key_copy if self.kernel.ragged else self.key
        return self._products(head, queries, key[keys, self.heads.window(head)])

    def _key_count(self) -> Any:
        """Number of valid keys from the start of this block (may exceed the block)."""
        return self.kernel.keys - self.grid_step.inner * self.blocks.keys

    def _products(self, head: int, queries: slice, key: Array) -> Array:
        """Products of a slice of keys, `r width`, and a slice of queries."""
        if self.heads.paired:
            return dot(key, self.query_copy[head, :, queries], (1, 0))
        return dot(key, self.query[queries, self.heads.window(head)], (1, 1))

    def _weights(self, masked: bool, unit, products: Array) -> tuple[Array, Array | None]:
        """Exponentials, in the dtype of the values, and the factor for earlier sums (None is 1)."""
        head, queries, keys = unit
        scores = products * self.factor
        mask = None
        if masked:
            _, low, high = self.masks
            high = None if high is None else high[0:1, queries]
            mask = visible(self.codes[keys, :], low[0:1, queries], high, scores.shape)
            scores = jnp.where(mask, scores, NEGATIVE)
        reference, shrink = self.reference[head, 0:1, queries], None
        if keys.start == 0 and not self.kernel.exact:
            reference = jnp.where(self.grid_step.first, self._sample(products), reference)
            self._refer(head, queries, reference)
        if self.kernel.exact:
            before = self._unless_first(keys, reference, NEGATIVE)
            reference = jnp.maximum(before, scores.max(0, keepdims=True))
            shrink = jnp.exp2(before - reference)
            self._refer(head, queries, reference)
        weights = jnp.exp2(scores - reference)
        if self.kernel.exact and mask is not None:
            # Before a query's first visible key, its largest score is `NEGATIVE`: exp2 would give 1.
            weights = jnp.where(mask, weights, 0.0)
        weights = weights.astype(self.value_t.dtype)
        if not self.kernel.ones:
            wide = weights.astype(jnp.float32)
            if self.kernel.ragged:
                wide = filled(wide, self._key_count() - keys.start, 0.0)
            self._sum(head, self.totals, queries, keys, wide.reshape(-1, 8, wide.shape[1]).sum(0), shrink)
        return weights, shrink

    def _sample(self, products: Array) -> Array:
        """The largest scores among the first `_SAMPLE` keys of a block's first unit."""
        return self.factor * products[:_SAMPLE].max(0, keepdims=True)

    def _refer(self, head: int, queries: slice, reference: Array) -> None:
        """Stores the reference of the exponentials."""
        self.reference[head, :, queries] = jnp.broadcast_to(reference, (8, reference.shape[1]))

    def _add(self, ending: bool, unit, transformed: tuple[Array, Array | None]) -> None:
        (head, queries, keys), (weights, shrink) = unit, transformed
        rows = slice(None) if self.kernel.ones else self.channels
        self._sum(head, rows, queries, keys, dot(self.value_t[head, rows, keys], weights, (1, 0)), shrink)
        if ending and keys.stop == self.blocks.keys:
            self._finish(head, queries)

    def _sum(self, head: int, rows: slice, queries: slice, keys: slice, added: Array, shrink) -> None:
        before = self._unless_first(keys, self.sums[head, rows, queries], 0.0)
        self.sums[head, rows, queries] = added + (before if shrink is None else before * shrink)

    def _unless_first(self, keys: slice, stored: Array, initial: Any) -> Array:
        """`stored`, the sum of earlier units, or `initial` at the first keys of a block of queries."""
        return jnp.where(self.grid_step.first, initial, stored) if keys.start == 0 else stored

    def _raise(self) -> None:
        """Raises the reference of queries with a large sum by a power of two, so that the sum is about 1."""
        for head in range(self.heads.together):
            total = self.sums[head, self.totals].sum(0, keepdims=True)
            up = jnp.where(total > 1.0, jnp.round(jnp.log2(total)), 0.0)
            shrink = jnp.where(total < _OVERFLOW, jnp.exp2(-up), jnp.nan)
            self.reference[head] += up
            self.sums[head] *= shrink

    def finish(self) -> None:
        """Runs after the last block of keys."""
        for head in range(self.heads.together):
            self._finish(head, slice(None))

    def _finish(self, head: int, queries: slice) -> None:
        """Writes the results of a slice of queries; for a pair of heads, the output at the second head."""
        sums = self.sums[head, :, queries]
        total = sums[self.totals].sum(0, keepdims=True)
        logarithm = self.reference[head, 0:1, queries] + jnp.log2(total)
        if self.kernel.exact:
            seen = total != 0
            total = jnp.where(seen, total, 1.0)
            logarithm = jnp.where(seen, logarithm, -jnp.inf)
        else:
            good = (total > _UNDERFLOW) & (total < _OVERFLOW)
            logarithm = jnp.where(good, logarithm, jnp.nan)
        self.log_sum_exp[head : head + 1, queries] = logarithm * math.log(2)
        mean = (sums[self.channels] * (1 / total)).astype(self.output.dtype)
        means = [*self.means.pop(queries.start, []), mean]
        if len(means) * self.heads.padded < self.heads.width:
            self.means[queries.start] = means
        else:
            self.output[queries, self.heads.window(head)] = jnp.concatenate(means, axis=0).T

    def write_zeros(self) -> None:
        """Writes the results of a block of queries that sees no key."""
        self.output[...] = jnp.zeros_like(self.output)
        self.log_sum_exp[...] = jnp.full_like(self.log_sum_exp, -jnp.inf)
