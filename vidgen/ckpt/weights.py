"""Weights as safetensors: a tree of arrays by dotted names, without optimizer and without pickle."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vidgen.ckpt.foreign import Foreign
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree

__all__ = ["WeightsError", "load_weights", "save_weights", "tensor_shapes"]


class WeightsError(ValueError):
    """A file of weights that does not fit the model; the message names every tensor concerned."""


def save_weights(
    path: pathlib.Path | str,
    tree: PyTree,
    *,
    names: Mapping[str, Foreign] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the arrays of `tree` under their dotted names; the file appears whole or not at all.

    With several processes all of them must call this; process 0 writes.

    Args:
      names: for another program: its name and layout of each array.
      metadata: strings for the file's header.
    """
    path = pathlib.Path(path)
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        foreign = _foreign(names, name, leaf)
        arrays[foreign.name] = np.asarray(foreign.to_theirs(_on_host(leaf)), order="C")
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(arrays, temporary, metadata=dict(metadata or {}))
    os.replace(temporary, path)


def load_weights(
    path: pathlib.Path | str,
    abstract_tree: PyTree,
    *,
    names: Mapping[str, Foreign] | None = None,
    ignore: str | None = None,
    remedy: str = "use the config of its run",
) -> PyTree:
    """The arrays of a file in a tree like `abstract_tree`.

    Args:
      abstract_tree: `jax.ShapeDtypeStruct`s (or arrays, whose values are not read); where they have a
        sharding the arrays are laid out by it. Floating point numbers are cast to the type asked for.
      names: of a file by another program: its name and layout of each array.
      ignore: regular expression for whole names of tensors that the file may hold and nobody needs.
      remedy: what to do about tensors that do not fit, for the error.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: tensors are missing, left over, or of another shape; all of them are named.
    """
    wanted = [(_foreign(names, name, leaf), leaf) for name, leaf in named_leaves(abstract_tree).items()]
    found = {
        name: shape for name, shape in tensor_shapes(path).items() if not re.fullmatch(ignore or "", name)
    }
    problems = list(_problems({f.name: f.shape(tuple(leaf.shape)) for f, leaf in wanted}, found))
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(f"{path} does not fit the model ({len(problems)} tensors): {remedy}\n  {listed}")
    with _opened(path) as file:
        arrays = [
            _placed(foreign.to_ours(file.get_tensor(foreign.name), tuple(leaf.shape)), leaf)
            for foreign, leaf in wanted
        ]
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), arrays)


def tensor_shapes(path: pathlib.Path | str) -> dict[str, tuple[int, ...]]:
    """The names of a file's tensors with their shapes; reads the header only.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: it is no safetensors file.
    """
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: pathlib.Path | str) -> Iterator[Any]:
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected weights in safetensors format")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{path} is no complete safetensors file ({error}): write it again") from error


def _foreign(names: Mapping[str, Foreign] | None, name: str, leaf: Any) -> Foreign:
    return Foreign(name, tuple(range(len(leaf.shape)))) if names is None else names[name]


def _problems(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(wanted.keys() - found.keys()):
        yield f"{name}: missing in the file, expected {wanted[name]}"
    for name in sorted(found.keys() - wanted.keys()):
        yield f"{name}: only in the file, {found[name]}"
    for name in sorted(wanted.keys() & found.keys()):
        if found[name] != wanted[name]:
            yield f"{name}: {found[name]} in the file, expected {wanted[name]}"


def _placed(array: np.ndarray, leaf: Any) -> jax.Array:
    array = array.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    # Under `jax.set_mesh`, `eval_shape` gives shardings over an abstract mesh, which has no devices.
    if sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return jax.numpy.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
