"""Self-attention of a sequence whose tokens are sharded over the mesh axis `context`.

Four methods, all exact: `gather` (all-gather of keys and values), `ulysses` (all-to-all between tokens and
heads before and after attention, so that each device attends over the full sequence with some of the heads;
arXiv 2309.14509), `ring` (ppermute of keys and values; arXiv 2310.01889), and rings of `ulysses` groups
(arXiv 2405.07719) where there are more devices than heads.
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
from vidgen.core.typing import Array, Float
from vidgen.ops.attention import Implementation, attention
from vidgen.ops.attention_blocks import ATTENTION
from vidgen.ops.key_ranges import KeyRanges
from vidgen.ops.ring_attention import Ring, ring_attention
from vidgen.parallel.rules import constrain, partition_spec

__all__ = ["SequenceParallel", "sequence_attention"]

_AXIS = "context"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallel:
    """Method of self-attention over tokens that are sharded over the mesh axis `context`.

    Attributes:
      method: `ulysses` is an all-to-all of heads; `ring` a ppermute of keys and values; `gather` an
        all-gather of them; `auto` is `ulysses` in the largest groups that the number of heads allows, and
        rings of such groups.
      ulysses: for that method, devices per all-to-all group, which are neighbours; the groups form rings.
        None is one group of all devices.
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
        """Number of devices per all-to-all group.

        Args:
          context: number of devices that shard the tokens.
          heads: heads per device.

        Raises:
          UserError: heads or devices are no multiple of `ulysses`; the message names the values that work.
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
                f"sequence: ulysses={degree} must divide the {context} devices of the mesh axis `context` "
                f"and the {heads} heads on each (the model's heads, sharded over the mesh axis `tensor`). "
                f'Use ulysses={" or ".join(works)}, or method="auto"'
            )
        return degree


def sequence_attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b s n k"],
    value: Float[Array, "b s n k"],
    *,
    options: SequenceParallel = SequenceParallel(),
    ranges: KeyRanges | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s n k"]:
    """Softmax self-attention, with tokens sharded over the axis `context` of the mesh in context.

    With `auto` or `gather`, if `context` does not divide the tokens, `partition_spec` replicates them and
    each device attends over all of them.

    Args:
      ranges: tokens that each token sees, from `vidgen.ops.key_ranges`; None is all.
      implementation: attention implementation on each device. In rings it is a Pallas kernel (`auto`: only on
        TPUs) or `Blocks`; `cudnn` means `Blocks` there.

    Raises:
      UserError: the method requires a number of tokens or heads that the mesh divides.
      NotImplementedError: the named implementation does not support these shapes or dtypes.
    """
    plain = functools.partial(attention, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape[_AXIS]
    spec = None if context == 1 else partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    if spec is None or spec[1] is None:
        if options.method in ("ulysses", "ring") and context > 1:
            raise UserError(_not_divisible(query.shape[1], context, options.method))
        return plain(query, key, value, ranges=ranges)
    if options.method == "gather":
        return _gathered(plain, query, key, value, ranges)
    heads = query.shape[2] // (1 if spec[2] is None else mesh.shape[spec[2]])
    layout = _Layout(context, options.degree(context, heads))
    # Ranges are small: they are replicated over `context`.
    y = jax.shard_map(
        functools.partial(_on_each_device, layout, implementation),
        in_specs=(spec, spec, spec, PartitionSpec(spec[0], None)),
        out_specs=spec,
        check_vma=False,  # Kernels do not declare the mesh axes that their results vary over.
    )(query, key, value, ranges)
    return checkpoint_name(y, ATTENTION)


class _Layout(NamedTuple):
    """Layout along `context`: device `ring_index * ulysses + i` is the i-th of its all-to-all group."""

    context: int
    ulysses: int

    @property
    def ring(self) -> int:
        return self.context // self.ulysses

    def exchange(self, x: Array, split: int, joined: int) -> Array:
        """All-to-all within the group: splits dimension `split` and concatenates along `joined`."""
        if self.ulysses == 1:
            return x
        groups = [[ring * self.ulysses + i for i in range(self.ulysses)] for ring in range(self.ring)]
        return jax.lax.all_to_all(
            x, _AXIS, split, joined, tiled=True, axis_index_groups=None if self.ring == 1 else groups
        )


def _gathered(
    plain: Callable[..., Array], query: Array, key: Array, value: Array, ranges: KeyRanges | None
) -> Array:
    query = constrain(query, "batch", "tokens", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    if ranges is not None:
        codes, *limits = ranges
        limits = jax.tree.map(lambda x: constrain(x, "batch", "tokens"), limits)
        ranges = KeyRanges(constrain(codes, "batch", None), *limits)
    y = plain(query, key, value, ranges=ranges)
    return constrain(y, "batch", "tokens", "heads", None)


def _on_each_device(
    layout: _Layout,
    implementation: Implementation,
    query: Array,
    key: Array,
    value: Array,
    ranges: KeyRanges | None,
) -> Array:
    query, key, value = (layout.exchange(x, 2, 1) for x in (query, key, value))
    if layout.ring == 1:
        y = attention(query, key, value, ranges=ranges, implementation=implementation)
    else:
        ring = Ring(axis=_AXIS, devices=layout.context, stride=layout.ulysses)
        y = ring_attention(ring, implementation, query, key, value, ranges)
    return layout.exchange(y, 1, 2)


def _not_divisible(tokens: int, context: int, method: str) -> str:
    lower = tokens // context * context
    nearest = f"{lower} or {lower + context}" if lower else f"{context}"
    return (
        f'sequence: {tokens} tokens do not divide over context={context} devices, which method="{method}" '
        f"needs; the nearest multiples are {nearest}: change the size of the video, or the mesh"
    )
