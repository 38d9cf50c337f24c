"""Compares the shardings of a compiled step's output state with the requested ones."""

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
    """Shardings of a training state's arrays, in bytes of the global arrays except `per_chip_bytes`.

    Attributes:
      num_arrays: number of parameters, averages and moments compared.
      as_asked: number of arrays with the requested sharding: a parameter by its logical axes, an average or
        moment as its parameter.
      moved: the other arrays: name -> requested and found sharding.
      total_bytes: of all arrays.
      sharded_bytes: of the arrays that are not fully replicated.
      per_chip_bytes: of all arrays on one device.
      replicated: name -> bytes of the fully replicated arrays, largest first.
    """

    num_arrays: int
    as_asked: int
    moved: dict[str, str]
    total_bytes: int
    sharded_bytes: int
    per_chip_bytes: int
    replicated: dict[str, int]


def compare_layout(state: TrainState, found: TrainState) -> Layout:
    """Compares the shardings of a step's input state with those of its output state.

    Args:
      state: `jax.ShapeDtypeStruct`s with the requested shardings.
      found: the same tree with shardings as leaves, from `compiled.output_shardings`.
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
        if not sharding.is_fully_replicated:
            sharded += size
        elif sharding.num_devices > 1:
            replicated[name] = size
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
    """The parameter whose name ends the array's name, if the shapes are equal; otherwise None."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        parameter = parameters.get(".".join(parts[start:]))
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter
    return None


def _spec(sharding: jax.sharding.Sharding) -> str:
    return str(getattr(sharding, "spec", sharding))
