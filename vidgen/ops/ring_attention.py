"""Attention over a ring of devices: keys and values travel, queries stay (arXiv 2310.01889).

What a turn sends leaves before its attention is computed, and arrives meanwhile. Results of turns merge, and
gradients add up, in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.ops.attention import Implementation
from vidgen.ops.attention_blocks import (
    ATTENTION,
    AttentionKernel,
    Blocks,
    PartialAttention,
    block_score_bytes,
    merge,
)
from vidgen.ops.attention_cpu import Masks
from vidgen.ops.attention_kernels import Kernels, device_kind, key_ranges
from vidgen.ops.score_budget import check_scores, report_fallback
from vidgen.pallas_kernels.attention.masks import KeyRanges

__all__ = ["Ring", "ring_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Devices that pass on to each other, two or more; several such rings lie along a mesh axis.

    Attributes:
      axis: of the mesh.
      devices: of that axis.
      stride: how far apart along the axis the neighbours are; how many rings there are.
    """

    axis: str
    devices: int
    stride: int = 1

    @property
    def size(self) -> int:
        """Devices of one ring."""
        return self.devices // self.stride

    def ring_index(self) -> Array:
        """This device's place in its ring."""
        return jax.lax.axis_index(self.axis) // self.stride

    def send_to_next(self, x: Array) -> Array:
        """Sends to the next device of the ring, receives from the one before."""
        to_next = [(i, (i + self.stride) % self.devices) for i in range(self.devices)]
        return jax.lax.ppermute(x, self.axis, to_next)


def ring_attention(
    ring: Ring,
    implementation: Implementation,
    query: Float[Array, "b s n k"],
    key: Float[Array, "b s n k"],
    value: Float[Array, "b s n k"],
    key_mask: Bool[Array, "b r"] | None = None,
    segments: Int[Array, "b r"] | None = None,
) -> Float[Array, "b s n k"]:
    """Softmax self-attention, within `shard_map`; a query that sees no key gives zeros.

    Args:
      implementation: a Pallas kernel, that of TPUs for `auto` on TPUs; or plain JAX in blocks (also `cudnn`).
      query, key, value: of this device's tokens.
      key_mask, segments: of all tokens of the ring, as `vidgen.ops.sequence_parallel` has them.

    Raises:
      NotImplementedError: the implementation that was named takes no such shapes or dtypes.
      ScoresTooLarge: plain JAX would have more than `score_budget.SCORE_BYTES` of scores in memory.
    """
    turns = _RingStep(ring=ring, parts=_parts(implementation), scale=query.shape[-1] ** -0.5)
    return _attend(turns, query, key, value, key_mask, segments)


def _parts(implementation: Implementation) -> tuple[AttentionKernel, ...]:
    """What may compute, the fastest first."""
    if implementation == "pallas_tpu" or implementation == "pallas_gpu":
        return (Kernels.of(implementation),)
    if implementation == "auto" and device_kind()[0] == "tpu":
        try:
            return (Kernels.of("pallas_tpu"), Blocks())
        except NotImplementedError:
            pass
    return (Blocks(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RingStep:
    """What devices do in a turn of the ring.

    Arrays that travel are `b s (n k)`, as TPU kernels read them: no turn copies them to another layout.

    Attributes:
      parts: what computes, the first that takes the shapes and the dtype.
      scale: of the products.
    """

    ring: Ring
    parts: tuple[AttentionKernel, ...]
    scale: float

    def attend(self, query: Array, keys: tuple[Array, ...], ranges: KeyRanges | None) -> PartialAttention:
        arrays = (query, *(x.reshape(query.shape) for x in keys))
        call = lambda part: part.forward(*arrays, scale=self.scale, ranges=ranges)  # noqa: E731
        mean, log_sum_exp = _first_possible(call, self.parts, *arrays[:2])
        return PartialAttention(_flat(mean), log_sum_exp)

    def gradients(
        self,
        query: Array,
        keys: tuple[Array, ...],
        results: tuple[Array, Array],
        cotangent: Array,
        ranges: KeyRanges | None,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Of the query, and of keys and values; kernels round them to the inputs' dtype, `Blocks` not."""
        arrays = (query, *(x.reshape(query.shape) for x in keys), *results, cotangent)
        call = lambda part: part.backward(*arrays, scale=self.scale, ranges=ranges)  # noqa: E731
        of_query, *rest = (_flat(x) for x in _first_possible(call, self.parts, *arrays[:2]))
        return of_query, tuple(rest)

    def overlap_with_send(self, compute: Callable[[], Any], in_flight: Any) -> tuple[Any, Any]:
        """The result of `compute`, and what comes in place of the arrays that are sent on during it."""
        coming = jax.tree.map(self.ring.send_to_next, in_flight)
        # Nothing that uses the result begins before all has come. The compiler, which does not know how long
        # a kernel takes, then sends before the kernel; else it may send during the little that follows.
        return jax.lax.optimization_barrier((compute(), coming))

    def ranges(
        self, query: Array, key_mask: Array | None, segments: Array | None, step: Array | int
    ) -> KeyRanges | None:
        """What this device's tokens see of the keys that have come to it after so many steps."""
        length = query.shape[1]
        here = self.ring.ring_index()
        whose = (here - step) % self.ring.size

        def part(x: Array | None, place: Array) -> Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, place * length, length, axis=1)

        return key_ranges(Masks(part(key_mask, whose), part(segments, here), part(segments, whose)), query)


def _flat(x: Array) -> Array:
    """`b s n k` as `b s (n k)`."""
    return x.reshape(*x.shape[:2], -1)


def _first_possible(
    call: Callable[[AttentionKernel], Any], parts: tuple[AttentionKernel, ...], query: Array, key: Array
) -> Any:
    """What the first part that takes the arrays gives; what refused is logged.

    Raises:
      NotImplementedError: the last part refuses too.
      ScoresTooLarge: it has too many scores in memory.
    """
    *preferred, last = parts
    reasons: dict[str, Exception] = {}
    for part in preferred:
        try:
            return call(part)
        except NotImplementedError as error:
            reasons[getattr(part, "kind", "blocks")] = error
    if isinstance(last, Blocks):
        size = query.shape[0] * query.shape[2] * block_score_bytes(query.shape[1], key.shape[1])
        check_scores("blocks", size)
        report_fallback(query, key, "blocks", size, reasons)
    return call(last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    turns: _RingStep, query: Array, key: Array, value: Array, key_mask: Array | None, segments: Array | None
) -> Array:
    return _forward(turns, query, key, value, key_mask, segments)[0]


def _forward(
    turns: _RingStep, query: Array, key: Array, value: Array, key_mask: Array | None, segments: Array | None
):
    def attend(keys: tuple[Array, ...], step: Array | int) -> PartialAttention:
        return turns.attend(query, keys, turns.ranges(query, key_mask, segments, step))

    def turn(carry, step: Array):
        attended, keys = carry
        part, keys = turns.overlap_with_send(lambda: attend(keys, step), keys)
        return (merge(attended, part), keys), None

    rows = jnp.full_like(query[..., 0].swapaxes(1, 2), -jnp.inf, jnp.float32)
    nothing = PartialAttention(jnp.zeros_like(_flat(query), jnp.float32), rows)
    last = turns.ring.size - 1
    (attended, keys), _ = jax.lax.scan(turn, (nothing, (_flat(key), _flat(value))), jnp.arange(last))
    attended = merge(attended, attend(keys, last))
    results = (attended.mean.astype(query.dtype).reshape(query.shape), attended.log_sum_exp)
    results = tuple(checkpoint_name(x, ATTENTION) for x in results)
    return results[0], (query, key, value, key_mask, segments, results)


def _backward(turns: _RingStep, saved, cotangent: Array):
    """Keys and values travel again; the sums of their gradients follow one turn behind, and end at home."""
    query, key, value, key_mask, segments, results = saved
    keys = (_flat(key), _flat(value))
    last = turns.ring.size - 1

    def gradients(keys: tuple[Array, ...], step: Array | int) -> tuple[Array, tuple[Array, ...]]:
        return turns.gradients(query, keys, results, cotangent, turns.ranges(query, key_mask, segments, step))

    def turn(carry, step: Array):
        sums, keys = carry
        parts, (of_others, keys) = turns.overlap_with_send(lambda: gradients(keys, step), (sums[1], keys))
        return (jax.tree.map(jnp.add, (sums[0], of_others), parts), keys), None

    first, keys = turns.overlap_with_send(lambda: gradients(keys, 0), keys)
    sums = jax.tree.map(lambda x: x.astype(jnp.float32), first)
    (sums, keys), _ = jax.lax.scan(turn, (sums, keys), jnp.arange(1, last))
    parts, of_others = turns.overlap_with_send(lambda: gradients(keys, last), sums[1])
    of_query, of_others = jax.tree.map(jnp.add, (sums[0], of_others), parts)
    grads = (of_query, *map(turns.ring.send_to_next, of_others))
    return (*(grad.astype(query.dtype).reshape(query.shape) for grad in grads), None, None)


_attend.defvjp(_forward, _backward)
