"""Whether a compiled step leaves the state on the devices as asked: each parameter, average and moment."""

import dataclasses
import math
from typing import Any

import jax

from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.train.state import TrainState

__all__ = ["Layout", "compare_layout"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the arrays of a training state are, in bytes over all devices but for `per_chip_bytes`.

    Attributes:
      num_arrays: parameters, averages and moments compared.
      as_asked: how many lie as asked: a parameter by its logical axes, an average and a moment as their
        parameter.
      moved: the others, by name, with what was asked and what was found.
      total_bytes: of all of them, each counted once.
      sharded_bytes: of those that are cut over the devices.
      per_chip_bytes: of all of them on one device.
      replicated: those that every device holds whole, by name, with their bytes; largest first.
    """

    num_arrays: int
    as_asked: int
    moved: dict[str, str]
    total_bytes: int
    sharded_bytes: int
    per_chip_bytes: int
    replicated: dict[str, int]


def compare_layout(state: TrainState, found: TrainState) -> Layout:
    """Compares the state that is given to a step with the shardings of the one that comes out.

    Args:
      state: `jax.ShapeDtypeStruct`s with the shardings asked for.
      found: shardings in their places, as `compiled.output_shardings` has them.
    """
    asked = named_leaves(state.params)
    moved: dict[str, str] = {}
    replicated: dict[str, int] = {}
    num_arrays = total = sharded = per_chip = 0
    for name, leaf, sharding in _leaves(state, found):
        parameter = _parameter_of(name, leaf, asked)
        if parameter is None:
            continue
        num_arrays += 1
        if not sharding.is_equivalent_to(parameter.sharding, leaf.ndim):
            moved[name] = f"asked {_spec(parameter.sharding)}, found {_spec(sharding)}"
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        per_chip += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if sharding.is_fully_replicated and sharding.num_devices > 1:
            replicated[name] = size
        else:
            sharded += size
    return Layout(
        num_arrays=num_arrays,
        as_asked=num_arrays - len(moved),
        moved=moved,
        total_bytes=total,
        sharded_bytes=sharded,
        per_chip_bytes=per_chip,
        replicated=dict(sorted(replicated.items(), key=lambda item: -item[1])),
    )


def _leaves(state: TrainState, found: TrainState) -> list[tuple[str, Any, jax.sharding.Sharding]]:
    parts = ("params", "ema", "opt_state")
    return [
        (f"{part}.{name}", leaf, sharding)
        for part in parts
        for (name, leaf), sharding in zip(
            named_leaves(getattr(state, part)).items(), _shardings(getattr(found, part)), strict=True
        )
    ]


def _shardings(tree: PyTree) -> list[jax.sharding.Sharding]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, jax.sharding.Sharding))


def _parameter_of(name: str, leaf: Any, parameters: dict[str, Any]) -> Any:
    """The parameter that an array belongs to, or None: its name ends with the parameter's."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        parameter = parameters.get(".".join(parts[start:]))
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter
    return None


def _spec(sharding: jax.sharding.Sharding) -> str:
    return str(getattr(sharding, "spec", sharding))
