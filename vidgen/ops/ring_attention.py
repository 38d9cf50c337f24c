"""Ring attention: devices pass keys and values around a ring and hold their queries (arXiv 2310.01889).

Each step's `ppermute` overlaps with the attention of that step. Partial results are merged, and gradients
summed, in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidgen.core.typing import Array, Float
from vidgen.ops.attention import Implementation
from vidgen.ops.attention_blocks import (
    ATTENTION,
    AttentionKernel,
    Blocks,
    PartialAttention,
    block_score_bytes,
    merge,
)
from vidgen.ops.attention_kernels import Kernels, device_kind
from vidgen.ops.key_ranges import KeyRanges
from vidgen.ops.score_budget import check_scores, report_fallback

__all__ = ["Ring", "ring_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """A ring of two or more devices along a mesh axis, which may hold several interleaved rings.

    Attributes:
      axis: name of the mesh axis.
      devices: size of the mesh axis.
      stride: distance along the axis between neighbours of a ring; also the number of rings.
    """

    axis: str
    devices: int
    stride: int = 1

    @property
    def size(self) -> int:
        """Number of devices in one ring."""
        return self.devices // self.stride

    def ring_index(self) -> Array:
        """This device's position in its ring, in [0, size)."""
        return jax.lax.axis_index(self.axis) // self.stride

    def send_to_next(self, x: Array) -> Array:
        """Sends `x` to the next device of the ring and returns the array of the previous device."""
        to_next = [(i, (i + self.stride) % self.devices) for i in range(self.devices)]
        return jax.lax.ppermute(x, self.axis, to_next)


def ring_attention(
    ring: Ring,
    implementation: Implementation,
    query: Float[Array, "b s n k"],
    key: Float[Array, "b s n k"],
    value: Float[Array, "b s n k"],
    ranges: KeyRanges | None = None,
) -> Float[Array, "b s n k"]:
    """Softmax self-attention inside `shard_map`; zeros for a query that sees no key.

    Args:
      implementation: `pallas_tpu` or `pallas_gpu`; `auto` is the TPU kernel on TPUs; anything else, `cudnn`
        included, is `Blocks`.
      query, key, value: this device's tokens.
      ranges: ranges of all tokens of the ring, on every device.

    Raises:
      NotImplementedError: the named implementation does not support these shapes or dtypes.
      ScoresTooLarge: `Blocks` would hold more than `score_budget.SCORE_BYTES` of scores in memory.
    """
    ring_step = _RingStep(ring=ring, kernels=_kernels(implementation), scale=query.shape[-1] ** -0.5)
    return _attend(ring_step, query, key, value, ranges)


def _kernels(implementation: Implementation) -> tuple[AttentionKernel, ...]:
    """Kernels to try, fastest first."""
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
    """Computation and communication of one step of the ring.

    Arrays in flight are `b s (n k)`, the TPU kernels' layout, so that no step copies to another layout.

    Attributes:
      kernels: kernels to try; the first that supports the shapes and dtype computes.
      scale: factor on the query-key products.
    """

    ring: Ring
    kernels: tuple[AttentionKernel, ...]
    scale: float

    def attend(self, query: Array, keys: tuple[Array, ...], ranges: KeyRanges | None) -> PartialAttention:
        arrays = (query, *(x.reshape(query.shape) for x in keys))
        call = lambda kernel: kernel.forward(*arrays, scale=self.scale, ranges=ranges)  # noqa: E731
        mean, log_sum_exp = _first_supported(call, self.kernels, *arrays[:2])
        return PartialAttention(_flat(mean), log_sum_exp)

    def gradients(
        self,
        query: Array,
        keys: tuple[Array, ...],
        results: tuple[Array, Array],
        cotangent: Array,
        ranges: KeyRanges | None,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Gradients of query, and of keys and values: float32 from `Blocks`, else in the inputs' dtype."""
        arrays = (query, *(x.reshape(query.shape) for x in keys), *results, cotangent)
        call = lambda kernel: kernel.backward(*arrays, scale=self.scale, ranges=ranges)  # noqa: E731
        of_query, *rest = (_flat(x) for x in _first_supported(call, self.kernels, *arrays[:2]))
        return of_query, tuple(rest)

    def overlap_with_send(self, compute: Callable[[], Any], in_flight: Any) -> tuple[Any, Any]:
        """The result of `compute`, and the arrays received while `in_flight` is sent to the next device."""
        received = jax.tree.map(self.ring.send_to_next, in_flight)
        # The barrier makes users of the result wait for the transfer, so that XLA starts the transfer before
        # the kernel. XLA cannot estimate a kernel's duration: it may otherwise overlap the transfer with the
        # short operations that follow.
        return jax.lax.optimization_barrier((compute(), received))

    def local_ranges(self, ranges: KeyRanges | None, length: int, step: Array | int) -> KeyRanges | None:
        """The part for this device's `length` queries and the keys that it holds after `step` steps."""
        if ranges is None:
            return None
        query_index = self.ring.ring_index()
        key_index = (query_index - step) % self.ring.size
        indices = KeyRanges(key_index, query_index, None if ranges.high is None else query_index)
        part = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1)  # noqa: E731
        return jax.tree.map(part, ranges, indices)


def _flat(x: Array) -> Array:
    """Reshapes `b s n k` to `b s (n k)`."""
    return x.reshape(*x.shape[:2], -1)


def _first_supported(
    call: Callable[[AttentionKernel], Any], kernels: tuple[AttentionKernel, ...], query: Array, key: Array
) -> Any:
    """Result of `call` with the first kernel that supports the arrays; logs why others do not.

    Raises:
      NotImplementedError: the last kernel does not support them either.
      ScoresTooLarge: the last kernel is `Blocks` and would hold too many scores in memory.
    """
    *preferred, last = kernels
    reasons: dict[str, Exception] = {}
    for kernel in preferred:
        try:
            return call(kernel)
        except NotImplementedError as error:
            reasons[getattr(kernel, "kind", "blocks")] = error
    if isinstance(last, Blocks):
        size = query.shape[0] * query.shape[2] * block_score_bytes(query.shape[1], key.shape[1])
        check_scores("blocks", size)
        report_fallback(query, key, "blocks", size, reasons)
    return call(last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring_step: _RingStep, query: Array, key: Array, value: Array, ranges: KeyRanges | None) -> Array:
    return _forward(ring_step, query, key, value, ranges)[0]


def _forward(ring_step: _RingStep, query: Array, key: Array, value: Array, ranges: KeyRanges | None):
    def attend(keys: tuple[Array, ...], step: Array | int) -> PartialAttention:
        return ring_step.attend(query, keys, ring_step.local_ranges(ranges, query.shape[1], step))

    def body(carry, step: Array):
        attended, keys = carry
        part, keys = ring_step.overlap_with_send(lambda: attend(keys, step), keys)
        return (merge(attended, part), keys), None

    minus_inf = jnp.full_like(query[..., 0].swapaxes(1, 2), -jnp.inf, jnp.float32)
    nothing = PartialAttention(jnp.zeros_like(_flat(query), jnp.float32), minus_inf)
    last = ring_step.ring.size - 1
    (attended, keys), _ = jax.lax.scan(body, (nothing, (_flat(key), _flat(value))), jnp.arange(last))
    attended = merge(attended, attend(keys, last))
    results = (attended.mean.astype(query.dtype).reshape(query.shape), attended.log_sum_exp)
    results = tuple(checkpoint_name(x, ATTENTION) for x in results)
    return results[0], (query, key, value, ranges, results)


def _backward(ring_step: _RingStep, saved, cotangent: Array):
    """Passes keys and values around again; gradient sums follow one step later and return to their device."""
    query, key, value, ranges, results = saved
    keys = (_flat(key), _flat(value))
    last = ring_step.ring.size - 1

    def gradients(keys: tuple[Array, ...], step: Array | int) -> tuple[Array, tuple[Array, ...]]:
        part = ring_step.local_ranges(ranges, query.shape[1], step)
        return ring_step.gradients(query, keys, results, cotangent, part)

    def body(carry, step: Array):
        sums, keys = carry
        parts, (of_keys, keys) = ring_step.overlap_with_send(lambda: gradients(keys, step), (sums[1], keys))
        return (jax.tree.map(jnp.add, (sums[0], of_keys), parts), keys), None

    first, keys = ring_step.overlap_with_send(lambda: gradients(keys, 0), keys)
    sums = jax.tree.map(lambda x: x.astype(jnp.float32), first)
    (sums, keys), _ = jax.lax.scan(body, (sums, keys), jnp.arange(1, last))
    parts, of_keys = ring_step.overlap_with_send(lambda: gradients(keys, last), sums[1])
    of_query, of_keys = jax.tree.map(jnp.add, (sums[0], of_keys), parts)
    grads = (of_query, *map(ring_step.ring.send_to_next, of_keys))
    return (*(grad.astype(query.dtype).reshape(query.shape) for grad in grads), None)


_attend.defvjp(_forward, _backward)
