"""Modules out of folders that hold config.json and weights, as other programs write them."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.foreign import Foreign
from vidgen.ckpt.weights import load_weights
from vidgen.core.tree import named_leaves
from vidgen.parallel import processes
from vidgen.parallel.rules import shardings

__all__ = ["load_module", "read_json", "write_json"]

Module = TypeVar("Module", bound=nnx.Module)


def load_module(
    path: pathlib.Path | str,
    make: Callable[[], Module],
    *,
    mesh: Mesh | None = None,
    names: Callable[[Iterable[str]], Mapping[str, Foreign]] | None = None,
    ignore: str | None = None,
    remedy: str = "use the weights that belong to this config.json",
) -> Module:
    """The module that `make` would give, with the arrays of a file; nothing is computed for it.

    Args:
      mesh: over which the arrays are laid; None is one device.
      names: from our names to those of the program that wrote the file.
      ignore, remedy: as in `load_weights`.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: names every tensor that is missing, left over or of another shape.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make), graph=False)
    if mesh is not None:
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings(state, mesh),
        )
    table = None if names is None else names(named_leaves(state))
    return nnx.merge(graphdef, load_weights(path, state, names=table, ignore=ignore, remedy=remedy))


def read_json(path: pathlib.Path, *, remedy: str) -> dict[str, Any]:
    """What a file says.

    Raises:
      FileNotFoundError: it is missing; with the remedy.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    return json.loads(path.read_text())


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a file, which appears whole; process 0 does."""
    if not processes.is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)
