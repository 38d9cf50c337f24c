"""Stacks of identical layers: built by `vmap`, applied by `scan`, rematerialised by policy."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vidgen.core.typing import Array, PyTree
from vidgen.ops.attention_blocks import ATTENTION
from vidgen.parallel.rules import fsdp_is_sharded

Layer = TypeVar("Layer", bound=nnx.Module)

Remat = Literal["none", "dots", "attention", "full", "offload"]
"""Residuals saved for the backward pass: all (`none`), matrix products and attention outputs (`dots`),
attention outputs (`attention`), layer inputs (`full`), or layer inputs in host memory (`offload`).
docs/tpu.md lists the memory that each needs."""


def make_stack(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """One module holding `count` layers: its variables have a leading axis named `layers`."""
    stack = jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))

    def name_axis(variable: nnx.Variable) -> nnx.Variable:
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
        return variable

    return jax.tree.map(name_axis, stack, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


_INPUT = "layer_input"


def _all_but_gathered_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy that saves all residuals but weights from `all_gather_fsdp`, whose shards are saved instead."""
    return primitive.name != "linear_call"


_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_POLICIES = {
    "none": _all_but_gathered_weights,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def apply_stack(
    stack: nnx.Module,
    x: Array,
    apply: Callable[..., tuple[Array, PyTree]],
    *,
    per_layer: PyTree = None,
    remat: Remat = "none",
    **extra: PyTree,
) -> tuple[Array, PyTree]:
    """Output of the last layer, and the new values of all layers.

    Args:
      apply: computes a layer: (layer, x, the layer's slice of `per_layer`, **extra) -> (x, new slice). Slices
        are None without `per_layer`.
      per_layer: values of each layer, such as caches: a pytree whose arrays have a leading axis of layers.
      extra: passed to every layer.
    """

    def body(x: Array, layer: tuple[nnx.Module, PyTree]) -> tuple[Array, PyTree]:
        return apply(layer[0], checkpoint_name(x, _INPUT), layer[1], **extra)

    if remat != "none" or fsdp_is_sharded():
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (stack, per_layer))
