"""Weights as safetensors: a tree of arrays by dotted names, without optimizer and without pickle."""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh
from safetensors.numpy import save_file

from vidgen.ckpt.foreign import Foreign
from vidgen.ckpt.tensor_files import TensorFiles, WeightsError
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree

__all__ = ["WeightsError", "load_weights", "save_weights", "tensor_shapes"]


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
        foreign, array = _foreign(names, name, leaf), _on_host(leaf)
        layers = list(array) if foreign.stacked else [array]
        for theirs, layer in zip(foreign.shapes(array.shape), layers, strict=True):
            arrays[theirs] = np.asarray(foreign.to_theirs(layer), order="C")
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
    files = TensorFiles(path)
    leaves = named_leaves(abstract_tree)
    foreign = {name: _foreign(names, name, leaf) for name, leaf in leaves.items()}
    wanted = {}
    for name, leaf in leaves.items():
        wanted |= foreign[name].shapes(tuple(leaf.shape))
    found = {name: shape for name, shape in files.shapes.items() if not re.fullmatch(ignore or "", name)}
    problems = list(_problems(wanted, found))
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(
            f"{files.path} does not fit the model ({len(problems)} tensors): {remedy}\n  {listed}"
        )
    arrays = [
        _placed(functools.partial(_read, files, foreign[name], leaf), leaf) for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), arrays)


def tensor_shapes(path: pathlib.Path | str) -> dict[str, tuple[int, ...]]:
    """The names of a file's tensors with their shapes; reads the header only.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: it is no safetensors file.
    """
    return TensorFiles(path).shapes


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


def _read(files: TensorFiles, foreign: Foreign, leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A part of one of our arrays, layer by layer."""
    shape = tuple(leaf.shape)
    if not foreign.stacked:
        return np.array(foreign.to_ours(files.read(foreign.name), shape)[index], dtype=leaf.dtype)
    layers = [
        foreign.to_ours(files.read(foreign.name.format(layer)), shape[1:])[index[1:]]
        for layer in range(*index[0].indices(shape[0]))
    ]
    return np.stack(layers, dtype=leaf.dtype, casting="unsafe")


def _placed(read: Callable[[tuple[slice, ...]], np.ndarray], leaf: Any) -> jax.Array:
    """An array laid out as `leaf` asks; no more of it is on the host at a time than one device's part."""
    sharding = getattr(leaf, "sharding", None)
    # Under `jax.set_mesh`, `eval_shape` gives shardings over an abstract mesh, which has no devices.
    if sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return jax.numpy.asarray(read((slice(None),) * len(leaf.shape)))
    parts: list[jax.Array] = []
    last, array = None, None
    for device, index in sharding.addressable_devices_indices_map(tuple(leaf.shape)).items():
        if array is None or index != last:
            last, array = index, read(index)
        parts.append(jax.device_put(array, device))
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, parts)


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
