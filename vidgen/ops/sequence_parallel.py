"""Self-attention of a sequence whose tokens are cut over the mesh axis `context`.

Four ways, all exact: `gather` (each device fetches all keys and values), `ulysses` (devices exchange tokens
for heads before and after attention, so that each attends over the whole sequence with some of the heads;
arXiv 2309.14509), `ring` (keys and values travel from device to device; arXiv 2310.01889), and rings of
groups that exchange heads (arXiv 2405.07719), where there are more devices than heads to exchange.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.ops.attention import Implementation, attention
from vidgen.ops.attention_blocks import ATTENTION, Partial, Sight, attend, begin, finish, gradients
from vidgen.parallel.rules import constrain, partition_spec

__all__ = ["SequenceParallel", "sequence_attention"]

_AXIS = "context"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallel:
    """How tokens that are cut over the mesh axis `context` attend to each other.

    Attributes:
      method: `auto` exchanges heads among as many devices as the heads allow and makes rings of the rest;
        `ulysses` exchanges heads; `ring` passes keys and values around; `gather` fetches all of them.
      ulysses: for that method, how many of the devices exchange heads with each other, neighbours first; the
        rest form rings. None is all.
    """

    method: Literal["auto", "gather", "ulysses", "ring"] = "auto"
    ulysses: int | None = None

    def __post_init__(self):
        if self.ulysses is not None and (self.method != "ulysses" or self.ulysses < 1):
            raise ValueError(
                f'sequence: ulysses={self.ulysses} with method "{self.method}"; expected 1 or more devices, '
                'and method="ulysses"'
            )

    def degree(self, context: int, heads: int) -> int:
        """How many devices exchange heads with each other.

        Args:
          context: devices over which tokens are cut.
          heads: that each of them has.

        Raises:
          ValueError: the heads or the devices do not divide into so many; names the degrees that work.
        """
        if self.method == "ring":
            return 1
        if self.method == "auto":
            return math.gcd(context, heads)
        degree = context if self.ulysses is None else self.ulysses
        if context % degree or heads % degree:
            common = math.gcd(context, heads)
            works = [str(d) for d in range(1, common + 1) if common % d == 0]
            raise ValueError(
                f"sequence: {degree} devices shall exchange heads, of {context} over which tokens are cut, "
                f"with {heads} heads on each (those of the model over the mesh axis `tensor`): both numbers "
                f'must be multiples of `ulysses`. Use ulysses={" or ".join(works)}, or method="auto"'
            )
        return degree


def sequence_attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b s n k"],
    value: Float[Array, "b s n k"],
    *,
    options: SequenceParallel = SequenceParallel(),
    key_mask: Bool[Array, "b s"] | None = None,
    segment_ids: Int[Array, "b s"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s n k"]:
    """Softmax self-attention; on a mesh in context, of tokens that lie over the axis `context`.

    With the method `auto`, where the tokens do not divide over `context` every device has all of them, as
    `partition_spec` lays them, and attends for itself.

    Args:
      key_mask: which tokens may be attended to; at least one per row.
      segment_ids: a token attends to those of its own segment only.
      implementation: of attention on each device, but in rings.

    Raises:
      ValueError: the tokens, or the heads, do not divide as the method asks.
    """
    plain = functools.partial(attention, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape[_AXIS]
    spec = None if context == 1 else partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    if spec is None or spec[1] is None:
        if options.method in ("ulysses", "ring") and context > 1:
            raise ValueError(_not_divisible(query.shape[1], context, options.method))
        both = None if segment_ids is None else (segment_ids, segment_ids)
        return plain(query, key, value, key_mask=key_mask, segment_ids=both)
    if options.method == "gather":
        return _gathered(plain, query, key, value, key_mask, segment_ids)
    heads = query.shape[2] // (1 if spec[2] is None else mesh.shape[spec[2]])
    layout = _Layout(context, options.degree(context, heads))
    whole = PartitionSpec(spec[0], None)  # Numbers of tokens are few: every device has those of all.
    y = jax.shard_map(
        functools.partial(_on_each_device, layout, plain),
        in_specs=(spec, spec, spec, whole, whole),
        out_specs=spec,
    )(query, key, value, key_mask, segment_ids)
    return checkpoint_name(y, ATTENTION)


class _Layout(NamedTuple):
    """Devices along `context`: number `ring * ulysses + i` is the i-th of its group, which exchange heads."""

    context: int
    ulysses: int

    @property
    def ring(self) -> int:
        return self.context // self.ulysses

    def group(self) -> Array:
        """Which group, and so which part of the sequence after the exchange, this device is of."""
        return jax.lax.axis_index(_AXIS) // self.ulysses

    def exchange(self, x: Array, split: int, joined: int) -> Array:
        """Cuts dimension `split` within the group, and joins what the others send along `joined`."""
        if self.ulysses == 1:
            return x
        groups = [[ring * self.ulysses + i for i in range(self.ulysses)] for ring in range(self.ring)]
        return jax.lax.all_to_all(
            x, _AXIS, split, joined, tiled=True, axis_index_groups=None if self.ring == 1 else groups
        )

    def pass_on(self, *arrays: Array) -> tuple[Array, ...]:
        """Sends to the device of the next group, receives from the one before."""
        to_next = [(i, (i + self.ulysses) % self.context) for i in range(self.context)]
        return tuple(jax.lax.ppermute(x, _AXIS, to_next) for x in arrays)


def _gathered(
    plain: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    segment_ids: Array | None,
) -> Array:
    query = constrain(query, "batch", "tokens", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    both = None
    if segment_ids is not None:
        both = (constrain(segment_ids, "batch", "tokens"), constrain(segment_ids, "batch", None))
    y = plain(query, key, value, key_mask=key_mask, segment_ids=both)
    return constrain(y, "batch", "tokens", "heads", None)


def _on_each_device(
    layout: _Layout,
    plain: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    segment_ids: Array | None,
) -> Array:
    query, key, value = (layout.exchange(x, 2, 1) for x in (query, key, value))
    y: Any
    if layout.ring == 1:
        both = None if segment_ids is None else (segment_ids, segment_ids)
        y = plain(query, key, value, key_mask=key_mask, segment_ids=both)
    else:
        y = _ring(layout, query, key, value, key_mask, segment_ids)
    return layout.exchange(y, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    layout: _Layout, query: Array, key: Array, value: Array, key_mask: Array | None, segments: Array | None
) -> Array:
    return _ring_forward(layout, query, key, value, key_mask, segments)[0]


def _ring_forward(
    layout: _Layout, query: Array, key: Array, value: Array, key_mask: Array | None, segments: Array | None
):
    sight = functools.partial(_sight, layout, query.shape[1], key_mask, segments)

    def turn(carry, step: Array):
        partial, key, value = carry
        partial = attend(partial, query, key, value, sight(step))
        return (partial, *layout.pass_on(key, value)), None

    state: tuple[Partial, Array, Array] = (begin(query), key, value)
    (partial, last_key, last_value), _ = jax.lax.scan(turn, state, jnp.arange(layout.ring - 1))
    mean, log_weight = finish(attend(partial, query, last_key, last_value, sight(layout.ring - 1)))
    y, log_weight = (checkpoint_name(x, ATTENTION) for x in (mean.astype(query.dtype), log_weight))
    return y, (query, key, value, key_mask, segments, y, log_weight)


def _ring_backward(layout: _Layout, saved, cotangent: Array):
    """Keys and values travel again; the sums of their gradients travel with them, and end at home."""
    query, key, value, key_mask, segments, y, log_weight = saved
    sight = functools.partial(_sight, layout, query.shape[1], key_mask, segments)
    mean_cotangent = jnp.einsum("bsnk,bsnk->bns", y, cotangent, preferred_element_type=jnp.float32)

    def turn(carry, step: Array | int):
        of_query, of_key, of_value, key, value = carry
        query_part, key_part, value_part = gradients(
            query,
            key,
            value,
            sight(step),
            log_weight=log_weight,
            cotangent=cotangent,
            mean_cotangent=mean_cotangent,
        )
        return of_query + query_part, of_key + key_part, of_value + value_part, key, value

    def turn_and_pass(carry, step: Array):
        of_query, *travelling = turn(carry, step)
        return (of_query, *layout.pass_on(*travelling)), None

    zeros = (jnp.zeros_like(x, jnp.float32) for x in (query, key, value))
    carry, _ = jax.lax.scan(turn_and_pass, (*zeros, key, value), jnp.arange(layout.ring - 1))
    of_query, *of_others = turn(carry, layout.ring - 1)[:3]
    grads = (of_query, *layout.pass_on(*of_others))
    return (*(grad.astype(query.dtype) for grad in grads), None, None)


_ring.defvjp(_ring_forward, _ring_backward)


def _sight(
    layout: _Layout, length: int, key_mask: Array | None, segments: Array | None, step: Array | int
) -> Sight:
    """What this device's tokens see of the keys that have come to it after so many steps."""
    here = layout.group()
    whose = (here - step) % layout.ring

    def part(x: Array | None, group: Array) -> Array | None:
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, group * length, length, axis=1)

    return Sight(part(segments, here), part(segments, whose), part(key_mask, whose))


def _not_divisible(tokens: int, context: int, method: str) -> str:
    lower = tokens // context * context
    nearest = f"{lower} or {lower + context}" if lower else f"{context}"
    return (
        f'sequence: {tokens} tokens do not divide over context={context} devices, which method="{method}" '
        f"needs; the nearest numbers that do are {nearest}: change the size of the video, or the mesh"
    )
