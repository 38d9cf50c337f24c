"""Equal layers as one: constructed by `vmap`, applied by `scan`, rematerialised by policy. Done only here."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from flax import nnx

from vidgen.core.typing import Array, PyTree
from vidgen.ops.attention import RESULT

Layer = TypeVar("Layer", bound=nnx.Module)

Remat = Literal["none", "dots", "full"]
"""What the backward pass finds saved: everything, matrix products and results of attention, or just each
layer's input."""


def make_stack(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """`count` layers in one module whose variables have a leading axis named `layers`."""
    stack = jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))

    def name_axis(variable: nnx.Variable) -> nnx.Variable:
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
        return variable

    return jax.tree.map(name_axis, stack, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def apply_stack(
    stack: nnx.Module, x: Array, apply: Callable[..., Array], *, remat: Remat = "none", **extra: PyTree
) -> Array:
    """Runs the layers in order: x = apply(layer, x, **extra) for each; `extra` is the same for all."""

    def body(x: Array, layer: nnx.Module) -> tuple[Array, None]:
        return apply(layer, x, **extra), None

    if remat != "none":
        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable
        if remat == "dots":
            attention = policies.save_only_these_names(RESULT)
            policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, stack)
    return x
