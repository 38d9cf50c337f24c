"""Modules loaded from folders with config.json and weights, as written by other programs."""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.ckpt.weights import check_weights, load_weights
from vidgen.core.tree import named_leaves
from vidgen.parallel.rules import shardings

__all__ = ["check_module", "load_module"]

Module = TypeVar("Module", bound=nnx.Module)


def load_module(
    path: pathlib.Path | str,
    make: Callable[[], Module],
    *,
    mesh: Mesh | None = None,
    names: Callable[[Iterable[str]], Mapping[str, TensorMapping]] | None = None,
    bf16_pattern: str | None = None,
    ignore: str | None = None,
    keep_dtypes: bool = False,
    remedy: str = "use the weights that belong to this config.json",
) -> Module:
    """Module like `make()` with the arrays of a file; `make` is traced, not computed.

    Args:
      mesh: mesh over which the arrays are sharded; None places them on one device.
      names: maps native array names to the tensors of the external file.
      bf16_pattern: regular expression of the names of arrays to load as bfloat16.
      ignore, keep_dtypes, remedy: as in `load_weights`.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: names every tensor that is missing, unexpected or of another shape.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make), graph=False)
    if bf16_pattern is not None:
        state = _cast(state, bf16_pattern)
    if mesh is not None:
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings(state, mesh),
        )
    table = None if names is None else names(named_leaves(state))
    arrays = load_weights(path, state, names=table, ignore=ignore, keep_dtypes=keep_dtypes, remedy=remedy)
    return nnx.merge(graphdef, arrays)


def check_module(
    path: pathlib.Path | str,
    make: Callable[[], nnx.Module],
    *,
    names: Callable[[Iterable[str]], Mapping[str, TensorMapping]] | None = None,
    ignore: str | None = None,
    remedy: str = "use the weights that belong to this config.json",
) -> None:
    """Checks that `load_module` would find all tensors; reads the headers only.

    Raises:
      FileNotFoundError, WeightsError: as in `load_module`.
    """
    _, state = nnx.split(nnx.eval_shape(make), graph=False)
    table = None if names is None else names(named_leaves(state))
    check_weights(path, state, names=table, ignore=ignore, remedy=remedy)


def _cast(state: nnx.State, bf16_pattern: str) -> nnx.State:
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if re.fullmatch(bf16_pattern, name) else leaf.dtype)
        for name, leaf in named_leaves(state).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
