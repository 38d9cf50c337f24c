"""Low-rank adaptation of linear maps (Hu et al., arXiv 2106.09685)."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float
from vidgen.nn.layers import Linear
from vidgen.nn.variables import param, zeros
from vidgen.ops.matmul import matmul
from vidgen.parallel.rules import partition_spec

__all__ = [
    "LoRAOptions",
    "LowRank",
    "adapted",
    "add_low_rank",
    "add_to_layers",
    "linears",
    "merge_low_rank",
    "place_like",
]

ATTRIBUTE = "low_rank"
"""Attribute of a `Linear` that holds its LoRA, and hence part of the names of the LoRA arrays."""

_down_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1)
"""Uniform, bounded by 1 / sqrt(in_features), as in PEFT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Targets, rank and scale of LoRA.

    Attributes:
      rank: rank of the LoRA matrices.
      alpha: LoRA outputs are scaled by alpha / rank; None is alpha = rank.
      targets: regular expression that matches full names of linear maps, such as
        `blocks.self_attention.query`.
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
    """LoRA of a linear map, or of each layer of a stacked one; its output is zero at initialisation.

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
    """Dotted name and module of each linear map; a stack of layers counts as one."""
    for path, inner in nnx.iter_modules(module, graph=False):
        if isinstance(inner, Linear):
            yield ".".join(map(str, path)), inner


def adapted(module: nnx.Module) -> dict[str, Linear]:
    """Linear maps that have a LoRA, by dotted name."""
    return {name: linear for name, linear in linears(module) if hasattr(linear, ATTRIBUTE)}


def add_low_rank(module: nnx.Module, options: LoRAOptions, *, rngs: nnx.Rngs) -> None:
    """Attaches a LoRA to each target linear map, in place.

    Raises:
      UserError: no name matches `options.targets`; lists the names.
    """
    found = [linear for name, linear in linears(module) if re.fullmatch(options.targets, name)]
    if not found:
        names = ", ".join(name for name, _ in linears(module))
        raise UserError(f"lora.targets={options.targets!r} fits no linear map; there are {names}")
    for linear in found:
        setattr(linear, ATTRIBUTE, LowRank(linear, options.rank, options.scale, rngs=rngs))


def merge_low_rank(module: nnx.Module) -> None:
    """Merges each LoRA into its kernel, in place, and removes it; the kernels' sharding does not change.

    Peak extra memory is one new kernel and the dense LoRA product of one layer.
    """
    for linear in adapted(module).values():
        lora: LowRank = getattr(linear, ATTRIBUTE)
        layers = range(linear.kernel.shape[0]) if linear.kernel.ndim == 3 else (None,)
        changes = {layer: functools.partial(_product, lora, layer) for layer in layers}
        add_to_layers(linear.kernel, changes, scale=lora.scale)
        delattr(linear, ATTRIBUTE)


def add_to_layers(
    variable: nnx.Variable,
    changes: Mapping[int | None, Callable[[], np.ndarray | Array]],
    *,
    scale: float = 1.0,
) -> None:
    """Adds changes to a variable, in place, in float32; its sharding and dtype do not change.

    Args:
      changes: functions that return the change of each layer of a stacked array, or of the full array under
        the key None. One change is in memory at a time.
      scale: factor of the changes.
    """
    sharding = variable.get_value().sharding
    value = jnp.copy(variable.get_value())
    axes = variable.get_metadata().get("axes") or (None,) * value.ndim
    for layer, read in changes.items():
        change = read()
        if isinstance(change, np.ndarray):
            change = place_like(change, variable, axes if layer is None else axes[1:])
        # Two jitted functions: in a single one, XLA (jax 0.10, CPUs) copies all layers of a bfloat16 array.
        summed = _sum(value, change, scale, layer)
        value = summed if layer is None else _with_layer(value, summed, layer)
    variable.set_value(jax.device_put(value, sharding))


def place_like(array: np.ndarray, variable: nnx.Variable, axes: Sequence[str | None]) -> Array:
    """`array` on the devices of `variable`, sharded by its logical `axes`."""
    sharding = variable.get_value().sharding
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(array)
    spec = partition_spec(axes, array.shape, sharding.mesh)
    return jax.device_put(array, NamedSharding(sharding.mesh, spec))


def _product(lora: LowRank, layer: int | None) -> Array:
    return _matmul(lora.down[...], lora.up[...], layer)


@jax.jit
def _matmul(down: Array, up: Array, layer: int | Array | None) -> Array:
    down, up = (_layer_of(factor, layer).astype(jnp.float32) for factor in (down, up))
    return jnp.matmul(down, up, precision="highest")


@jax.jit
def _sum(value: Array, change: Array, scale: float | Array, layer: int | Array | None) -> Array:
    return (_layer_of(value, layer).astype(jnp.float32) + scale * change).astype(value.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(value: Array, new: Array, layer: int | Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(value, new, layer, 0)


def _layer_of(value: Array, layer: int | Array | None) -> Array:
    return value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
