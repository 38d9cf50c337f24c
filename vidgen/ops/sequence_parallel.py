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
from typing import Literal, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.ops.attention import Implementation, attention
from vidgen.ops.attention_blocks import ATTENTION
from vidgen.ops.ring_attention import Ring, ring_attention
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
            raise UserError(
                f'sequence: ulysses={self.ulysses} with method "{self.method}"; expected 1 or more devices, '
                'and method="ulysses"'
            )

    def degree(self, context: int, heads: int) -> int:
        """How many devices exchange heads with each other.

        Args:
          context: devices over which tokens are cut.
          heads: that each of them has.

        Raises:
          UserError: the heads or the devices do not divide into so many; names the degrees that work.
        """
        if self.method == "ring":
            return 1
        if self.method == "auto":
            return math.gcd(context, heads)
        degree = context if self.ulysses is None else self.ulysses
        if context % degree or heads % degree:
            common = math.gcd(context, heads)
            works = [str(d) for d in range(1, common + 1) if common % d == 0]
            raise UserError(
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
      implementation: of attention on each device. In rings it is a Pallas kernel, that of TPUs for `auto` on
        TPUs, or plain JAX in blocks, which `cudnn` too stands for there.

    Raises:
      UserError: the tokens, or the heads, do not divide as the method asks.
      NotImplementedError: the implementation that was named takes no such shapes or dtypes.
    """
    plain = functools.partial(attention, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape[_AXIS]
    spec = None if context == 1 else partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    if spec is None or spec[1] is None:
        if options.method in ("ulysses", "ring") and context > 1:
            raise UserError(_not_divisible(query.shape[1], context, options.method))
        both = None if segment_ids is None else (segment_ids, segment_ids)
        return plain(query, key, value, key_mask=key_mask, segment_ids=both)
    if options.method == "gather":
        return _gathered(plain, query, key, value, key_mask, segment_ids)
    heads = query.shape[2] // (1 if spec[2] is None else mesh.shape[spec[2]])
    layout = _Layout(context, options.degree(context, heads))
    whole = PartitionSpec(spec[0], None)  # Numbers of tokens are few: every device has those of all.
    y = jax.shard_map(
        functools.partial(_on_each_device, layout, implementation),
        in_specs=(spec, spec, spec, whole, whole),
        out_specs=spec,
        check_vma=False,  # Kernels do not say over which axes their results vary.
    )(query, key, value, key_mask, segment_ids)
    return checkpoint_name(y, ATTENTION)


class _Layout(NamedTuple):
    """Devices along `context`: number `ring * ulysses + i` is the i-th of its group, which exchange heads."""

    context: int
    ulysses: int

    @property
    def ring(self) -> int:
        return self.context // self.ulysses

    def exchange(self, x: Array, split: int, joined: int) -> Array:
        """Cuts dimension `split` within the group, and joins what the others send along `joined`."""
        if self.ulysses == 1:
            return x
        groups = [[ring * self.ulysses + i for i in range(self.ulysses)] for ring in range(self.ring)]
        return jax.lax.all_to_all(
            x, _AXIS, split, joined, tiled=True, axis_index_groups=None if self.ring == 1 else groups
        )


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
    implementation: Implementation,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    segment_ids: Array | None,
) -> Array:
    query, key, value = (layout.exchange(x, 2, 1) for x in (query, key, value))
    if layout.ring == 1:
        both = None if segment_ids is None else (segment_ids, segment_ids)
        y = attention(query, key, value, key_mask=key_mask, segment_ids=both, implementation=implementation)
    else:
        ring = Ring(axis=_AXIS, devices=layout.context, stride=layout.ulysses)
        y = ring_attention(ring, implementation, query, key, value, key_mask, segment_ids)
    return layout.exchange(y, 1, 2)


def _not_divisible(tokens: int, context: int, method: str) -> str:
    lower = tokens // context * context
    nearest = f"{lower} or {lower + context}" if lower else f"{context}"
    return (
        f'sequence: {tokens} tokens do not divide over context={context} devices, which method="{method}" '
        f"needs; the nearest numbers that do are {nearest}: change the size of the video, or the mesh"
    )
