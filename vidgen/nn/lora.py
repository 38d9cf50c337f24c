"""Low-rank adaptation of linear maps (Hu et al., arXiv 2106.09685)."""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float
from vidgen.nn.layers import Linear
from vidgen.nn.variables import param, zeros
from vidgen.ops.matmul import matmul

__all__ = ["LoRAOptions", "LowRank", "adapted", "add_low_rank", "linears", "merge_low_rank"]

ATTRIBUTE = "low_rank"
"""Of a linear map that is adapted; a part of the names of its arrays."""

_down_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1)
"""Bounded by 1 / sqrt(in_features), as PEFT's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Which linear maps are adapted, and how.

    Attributes:
      rank: of the update.
      alpha: the update is scaled by alpha / rank; None is as large as the rank.
      targets: regular expression for whole names of linear maps, as `blocks.self_attention.query`.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str = r"blocks\.(self_attention|cross_attention|ffn)\..*"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be at least 1")

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class LowRank(nnx.Module):
    """An update of low rank to a linear map, or to one of each layer; zero at first.

    Attributes:
      down: [in, rank], or [layers, in, rank].
      up: [rank, out], or [layers, rank, out].
    """

    def __init__(self, linear: Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        *layers, inputs, outputs = linear.kernel.shape
        *stacked, axis_in, axis_out = linear.kernel.get_metadata("axes")
        self.scale = scale
        self.down = param(rngs, _down_init, (*layers, inputs, rank), (*stacked, axis_in, "rank"))
        self.up = param(rngs, zeros, (*layers, rank, outputs), (*stacked, "rank", axis_out))

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        down, up = (variable[...].astype(x.dtype) for variable in (self.down, self.up))
        return self.scale * matmul(matmul(x, down), up)


def linears(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """All linear maps of a module by dotted name; those of a stack are one."""
    for path, inner in nnx.iter_modules(module, graph=False):
        if isinstance(inner, Linear):
            yield ".".join(map(str, path)), inner


def adapted(module: nnx.Module) -> dict[str, Linear]:
    """The linear maps that have an update."""
    return {name: linear for name, linear in linears(module) if hasattr(linear, ATTRIBUTE)}


def add_low_rank(module: nnx.Module, options: LoRAOptions, *, rngs: nnx.Rngs) -> None:
    """Gives the linear maps that are targets an update, in place.

    Raises:
      UserError: no name fits; there are names to choose from in the message.
    """
    found = [linear for name, linear in linears(module) if re.fullmatch(options.targets, name)]
    if not found:
        names = ", ".join(name for name, _ in linears(module))
        raise UserError(f"lora.targets={options.targets!r} fits no linear map; there are {names}")
    for linear in found:
        setattr(linear, ATTRIBUTE, LowRank(linear, options.rank, options.scale, rngs=rngs))


def merge_low_rank(module: nnx.Module) -> None:
    """Adds the updates to the kernels, in place, and removes them."""
    for linear in adapted(module).values():
        update: LowRank = getattr(linear, ATTRIBUTE)
        delta = update.scale * jnp.matmul(update.down[...], update.up[...], precision="highest")
        kernel = linear.kernel.get_value()
        linear.kernel.set_value((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
        delattr(linear, ATTRIBUTE)
