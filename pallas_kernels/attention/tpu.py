"""Attention on TPUs: `b s n k` in, `b s n k` out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import specs
from .block_schedule import most_listed
from .masks import BlockMask, KeyRanges
from .specs import GENERATIONS, BlockSizes
from .tpu_backward import BackwardKernel, equal_part, fitting
from .tpu_forward import ForwardKernel
from .tpu_layout import Heads, masking

__all__ = ["Call", "backward", "forward"]


def forward(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
    generation: str | None = None,
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Softmax attention on a TPU; same contract as `reference.forward`, for all scores finite in float32.

    Args:
      query, key, value: `b s n k`, `b r n k`, `b r n k`, bfloat16 or float32.
      scale, ranges, block_mask: as in `reference.forward`.
      generation: a key of `specs.GENERATIONS`; by default the device's.
      blocks: block sizes; by default from the table of `specs`.
      interpret: argument of `pallas_call`.

    Returns:
      The weighted mean of the values, `b s n k`, and the log-sum-exp, float32, `b n s`.

    Raises:
      NotImplementedError: heads of more than 256 channels, another dtype, a mask of too many blocks.
    """
    _check(query, key, value)
    call = Call.of(
        query,
        key,
        "forward",
        masked=ranges is not None,
        block_mask=block_mask,
        generation=generation,
        blocks=blocks,
    )
    if call.queries < query.shape[1]:
        part = functools.partial(
            forward, scale=scale, generation=call.generation, blocks=call.blocks, interpret=interpret
        )
        return _forward_in_parts(part, call.queries, query, (key, value), ranges, block_mask)
    masks = masking(query, key, call.blocks, ranges, block_mask, queries_outside=True)
    kernel = functools.partial(
        ForwardKernel,
        queries=query.shape[1],
        keys=key.shape[1],
        scale=_scale(query, scale),
        ones=GENERATIONS[call.generation].wide_mxu,
    )
    merged: Any = [call.heads.merged(x) for x in (query, key, value)]
    run = {"vmem_bytes": call.vmem_bytes, "interpret": interpret}
    results = kernel(heads=call.heads, blocks=call.blocks, masking=masks)(*merged, **run)

    def recompute_marked(output: Array, log_sum_exp: Array) -> tuple[Array, Array]:
        """Recomputes the blocks that hold marked queries (NaN) with the exact kernel, a smaller program."""
        heads, small = Heads.of(query), _exact_blocks(call.blocks)
        marked = jnp.isnan(log_sum_exp).any((1, 2))
        marked = jnp.pad(marked, ((0, 0), (0, -marked.shape[1] % small.queries)))
        marked = marked.reshape(marked.shape[0], -1, small.queries).any(2)
        masks = masking(query, key, small, ranges, block_mask, queries_outside=True, only=marked)
        grouped = log_sum_exp.reshape(log_sum_exp.shape[0], heads.groups, heads.together, -1)
        exact = kernel(heads=heads, blocks=small, masking=masks, exact=True)
        output, grouped = exact(*merged, previous=(output, grouped), **run)
        return output, grouped.reshape(log_sum_exp.shape)

    has_marked = jnp.isnan(results[1]).any()
    output, log_sum_exp = lax.cond(has_marked, recompute_marked, lambda *results: results, *results)
    return call.heads.split(output), log_sum_exp.reshape(query.shape[0], -1, query.shape[1])


def backward(
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    log_sum_exp: Array,
    cotangent: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
    generation: str | None = None,
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value on a TPU; same contract as `reference.backward`.

    Args:
      output, log_sum_exp: results of `forward`, or of attention to a superset of these keys; gradients over
        the subsets then add up.
      cotangent: gradient of the loss with respect to the output, `b s n k`.

    Raises:
      NotImplementedError: as `forward`; or not even one block of queries fits into VMEM.
    """
    _check(query, key, value)
    call = Call.of(
        query,
        key,
        "backward",
        masked=ranges is not None,
        block_mask=block_mask,
        generation=generation,
        blocks=blocks,
    )
    if call.queries < query.shape[1]:
        part = functools.partial(
            backward, scale=scale, generation=call.generation, blocks=call.blocks, interpret=interpret
        )
        of_queries = (query, output, log_sum_exp, cotangent)
        return _backward_in_parts(part, call.queries, of_queries, (key, value), ranges, block_mask)
    kernel = BackwardKernel(
        heads=call.heads,
        blocks=call.blocks,
        masking=masking(query, key, call.blocks, ranges, block_mask, queries_outside=False),
        queries=query.shape[1],
        keys=key.shape[1],
        scale=_scale(query, scale),
        transposed=GENERATIONS[call.generation].wide_mxu,
    )
    merged = call.heads.merged
    gradients = kernel(
        merged(query),
        merged(key),
        merged(value),
        merged(output),
        log_sum_exp.reshape(query.shape[0], call.heads.groups, call.heads.together, -1),
        merged(cotangent.astype(query.dtype)),
        vmem_bytes=call.vmem_bytes,
        interpret=interpret,
    )
    d_query, d_key, d_value = map(call.heads.split, gradients)
    return d_query, d_key, d_value


def _forward_in_parts(
    part: Callable[..., tuple[Array, Array]],
    size: int,
    query: Array,
    of_keys: tuple[Array, Array],
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
) -> tuple[Array, Array]:
    """`forward` in parts of `size` queries.

    Args:
      part: `forward` with its options bound.
      of_keys: key and value.
    """
    queries = query.shape[1]

    def one(_: None, of_part: tuple[Array, Any, Array | None]) -> tuple[None, tuple[Array, Array]]:
        query, limits, block_rows = of_part
        return None, part(query, *of_keys, **_masks_of_part(limits, block_rows, ranges, block_mask))

    parts = (_split(query, size), *_split_masks(size, ranges, block_mask))
    _, (output, log_sum_exp) = lax.scan(one, None, parts)
    return _joined(output, 1)[:, :queries], _joined(log_sum_exp, 2)[:, :, :queries]


def _backward_in_parts(
    part: Callable[..., tuple[Array, Array, Array]],
    size: int,
    of_queries: tuple[Array, Array, Array, Array],
    of_keys: tuple[Array, Array],
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
) -> tuple[Array, Array, Array]:
    """`backward` in parts of `size` queries; gradients of keys and values are summed in float32.

    Args:
      part: `backward` with its options bound.
      of_queries: query, output, log-sum-exp and cotangent.
      of_keys: key and value.
    """
    queries = of_queries[0].shape[1]

    def add(sums: tuple[Array, Array], one: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        (query, output, log_sum_exp, cotangent), limits, block_rows = one
        masks = _masks_of_part(limits, block_rows, ranges, block_mask)
        d_query, d_key, d_value = part(query, *of_keys, output, log_sum_exp, cotangent, **masks)
        return (sums[0] + d_key, sums[1] + d_value), d_query

    query, output, log_sum_exp, cotangent = of_queries
    # Padding queries get the log-sum-exp of a query without keys (-inf), which gives all gradients zero.
    log_sum_exp = _split(log_sum_exp, size, 2, constant_values=-jnp.inf)
    parts = (
        (_split(query, size), _split(output, size), log_sum_exp, _split(cotangent, size)),
        *_split_masks(size, ranges, block_mask),
    )
    key, value = of_keys
    zeros = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    (d_key, d_value), d_query = lax.scan(add, zeros, parts)
    return _joined(d_query, 1)[:, :queries], d_key.astype(key.dtype), d_value.astype(value.dtype)


def _split(x: Array, size: int, axis: int = 1, **padding: Any) -> Array:
    """Splits an axis into parts of `size`, along a new leading axis; the last part is padded."""
    count = -(-x.shape[axis] // size)
    beyond = [(0, count * size - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, beyond, **padding).reshape(shape), axis, 0)


def _joined(parts: Array, axis: int) -> Array:
    """Inverse of `_split`, with the last part's padding."""
    x = jnp.moveaxis(parts, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _split_masks(
    size: int, ranges: KeyRanges | None, block_mask: BlockMask | None
) -> tuple[tuple[Array | None, ...], Array | None]:
    """The limits of the ranges, and the rows of the block mask, split into parts of `size` queries."""
    limits = () if ranges is None else (ranges.low, ranges.high)
    block_rows = None if block_mask is None else _split(block_mask.blocks, size // block_mask.query_size, 0)
    return jax.tree.map(lambda x: _split(x, size, mode="edge"), limits), block_rows


def _masks_of_part(
    limits: tuple[Any, ...],
    block_rows: Array | None,
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
) -> dict[str, Any]:
    """Mask arguments of `forward` and `backward` for one part from `_split_masks`."""
    if block_mask is not None and block_rows is not None:
        block_mask = dataclasses.replace(block_mask, blocks=block_rows)
    ranges = None if ranges is None else KeyRanges(ranges.codes, *limits)
    return {"ranges": ranges, "block_mask": block_mask}


def _exact_blocks(blocks: BlockSizes) -> BlockSizes:
    """Block sizes of the exact variant of the forward pass, which is a smaller program."""
    return dataclasses.replace(blocks, ahead=1, lag=1).dividing(512, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Plan of a call, derived from its shapes, the device and the table of block sizes.

    Attributes:
      queries: queries per kernel call: all, or as many as the block schedule can list and, in a backward
        pass, have gradients that fit into VMEM.
      vmem_bytes: VMEM that a kernel may use.
    """

    heads: Heads
    blocks: BlockSizes
    queries: int
    generation: str
    vmem_bytes: int

    @classmethod
    def of(
        cls,
        query: Any,
        key: Any,
        which: specs.Pass,
        *,
        masked: bool,
        block_mask: BlockMask | None = None,
        generation: str | None = None,
        blocks: BlockSizes | None = None,
    ) -> "Call":
        """Plans a call.

        Args:
          query, key: arrays or `jax.ShapeDtypeStruct`s.
          which: "forward" or "backward".
          masked: whether there are key ranges.

        Raises:
          NotImplementedError: as `forward` and `backward`.
        """
        padded = Heads.of(query).padded
        generation = generation or specs.generation_of(jax.devices()[0].device_kind)
        if blocks is None:
            blocks = specs.block_sizes(
                generation,
                which,
                head_dim=padded,
                bits=jnp.finfo(query.dtype).bits,
                masked=masked,
            ).within(query.shape[1], key.shape[1])
        if block_mask is not None:
            blocks = blocks.dividing(block_mask.query_size, block_mask.key_size)
        vmem_bytes = GENERATIONS[generation].vmem_bytes
        multiple = blocks.queries if block_mask is None else block_mask.query_size
        if which == "forward":
            # The exact variant has a sparse schedule even without a mask.
            heads, most = Heads.of(query, blocks.heads), _most_queries(query, key, _exact_blocks(blocks))
            queries = equal_part(query.shape[1], multiple, most)
        else:
            listed = masked or block_mask is not None
            most = _most_queries(query, key, blocks) if listed else query.shape[1]
            heads, queries = fitting(query, blocks, vmem_bytes, multiple, most)
        return cls(heads=heads, blocks=blocks, queries=queries, generation=generation, vmem_bytes=vmem_bytes)


def _most_queries(query: Any, key: Any, blocks: BlockSizes) -> int:
    """Most queries whose blocks, paired with all blocks of keys, `block_schedule.Sparse` can list."""
    return blocks.queries * most_listed(query.shape[0], -(-key.shape[1] // blocks.keys))


def _check(query: Array, key: Array, value: Array) -> None:
    if query.dtype not in (jnp.bfloat16, jnp.float32) or {query.dtype} != {key.dtype, value.dtype}:
        raise NotImplementedError(
            f"attention: query {query.dtype}, key {key.dtype}, value {value.dtype}; the kernel takes "
            "bfloat16 or float32, the same for all"
        )


def _scale(query: Array, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale
