"""Weights as safetensors: pytrees of arrays by dotted name, without optimizer state or pickle."""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh

from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.scaled_tensors import ScaledTensors
from vidgen.ckpt.tensor_files import TensorFiles, TensorSpec, WeightsError, write_tensors
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.parallel import processes

__all__ = ["WeightsError", "check_weights", "load_weights", "save_weights", "tensor_shapes"]

_SHOWN = 60
"""Number of mismatched tensors that an error lists; with the wrong model, all mismatch."""

MAX_FILE_BYTES = 5 * 10**9
"""Larger weights are split into several files, as other programs do."""


def save_weights(
    path: pathlib.Path | str,
    tree: PyTree,
    *,
    names: Mapping[str, TensorMapping] | None = None,
    metadata: Mapping[str, str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the arrays of `tree` under their dotted names; each file appears atomically.

    Host memory holds one tensor of one layer at a time. With several processes all of them must call this;
    process 0 writes.

    Args:
      path: path of the file; more than `max_file_bytes` go to files `NAME-00001-of-00002.safetensors` and so
        on, with an index `NAME.safetensors.index.json` that is written last.
      names: for an external format: name and layout of each array.
      metadata: strings for the header of each file.
    """
    path = pathlib.Path(path)
    parts = _parts(tree, names)
    files = _split_by_size({part.name: part.spec for part in parts}, max_file_bytes)
    numbered = f"{path.stem}-{{:05}}-of-{len(files):05}{path.suffix}"
    paths = [path] if len(files) == 1 else [path.with_name(numbered.format(n + 1)) for n in range(len(files))]
    remaining = iter(parts)
    for file, specs in zip(paths, files, strict=True):
        tensors = (part.read() for part in itertools.islice(remaining, len(specs)))
        if processes.is_main_process():
            write_tensors(file, specs, tensors, metadata=metadata)
        else:
            for _ in tensors:  # Reading is a collective of all processes.
                pass
    index = path.with_name(path.name + ".index.json")
    if len(files) > 1:
        size = sum(spec.num_bytes for specs in files for spec in specs.values())
        where = {name: file.name for file, specs in zip(paths, files, strict=True) for name in specs}
        write_json(index, {"metadata": {"total_size": size}, "weight_map": where})
    # Files of an earlier call would be read instead of the new ones.
    if processes.is_main_process():
        (index if len(files) == 1 else path).unlink(missing_ok=True)


def load_weights(
    path: pathlib.Path | str,
    abstract_tree: PyTree,
    *,
    names: Mapping[str, TensorMapping] | None = None,
    ignore: str | None = None,
    keep_dtypes: bool = False,
    remedy: str = "use the config of its run",
) -> PyTree:
    """Arrays of a file, as a pytree like `abstract_tree`.

    Args:
      abstract_tree: `jax.ShapeDtypeStruct`s (or arrays, whose values are not read). Arrays get their
        shardings, if they have any; floating point numbers are cast to their dtypes.
      names: for an external format: name and layout of each array.
      ignore: regular expression for the full names of tensors in the file that are not needed.
      keep_dtypes: the arrays have the file's dtypes, not those of `abstract_tree`.
      remedy: what to do about tensors that do not fit, for the error message.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: tensors are missing, unexpected, or of another shape or type; the message names them.
    """
    files = ScaledTensors(path)
    leaves = named_leaves(abstract_tree)
    mappings = {name: _mapping(names, name, leaf) for name, leaf in leaves.items()}
    _check(files, mappings, leaves, ignore=ignore, remedy=remedy)
    if keep_dtypes:
        leaves = {name: _as_stored(files, mappings[name], leaf) for name, leaf in leaves.items()}
    arrays = [
        _place(functools.partial(_read, files, mappings[name], leaf), leaf) for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), arrays)


def check_weights(
    path: pathlib.Path | str,
    abstract_tree: PyTree,
    *,
    names: Mapping[str, TensorMapping] | None = None,
    ignore: str | None = None,
    remedy: str = "use the config of its run",
) -> None:
    """Checks that `load_weights` would find all tensors; reads the headers only.

    Raises:
      FileNotFoundError, WeightsError: as in `load_weights`.
    """
    leaves = named_leaves(abstract_tree)
    mappings = {name: _mapping(names, name, leaf) for name, leaf in leaves.items()}
    _check(ScaledTensors(path), mappings, leaves, ignore=ignore, remedy=remedy)


def tensor_shapes(path: pathlib.Path | str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a file, by name; reads the header only.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: it is not a safetensors file.
    """
    return ScaledTensors(path).shapes


def _mapping(names: Mapping[str, TensorMapping] | None, name: str, leaf: Any) -> TensorMapping:
    return TensorMapping(name, tuple(range(len(leaf.shape)))) if names is None else names[name]


def _check(
    files: TensorFiles,
    mappings: Mapping[str, TensorMapping],
    leaves: Mapping[str, Any],
    *,
    ignore: str | None,
    remedy: str,
) -> None:
    """Compares names, shapes and dtypes of a file's tensors with the required ones."""
    wanted: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, np.dtype] = {}
    for name, leaf in leaves.items():
        shapes = mappings[name].external_shapes(tuple(leaf.shape))
        wanted |= shapes
        kinds |= dict.fromkeys(shapes, np.dtype(leaf.dtype))
    found = {name: shape for name, shape in files.shapes.items() if not re.fullmatch(ignore or "", name)}
    problems = list(_problems(wanted, found))
    for name in sorted(wanted.keys() & found.keys()):
        if not _same_kind(files.dtypes[name], kinds[name]):
            problems.append(f"{name}: of type {files.dtypes[name]} in the file, expected {kinds[name]}")
    if problems:
        more = len(problems) - _SHOWN
        listed = "\n  ".join([*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])
        raise WeightsError(
            f"{files.path} does not fit the model ({len(problems)} tensors): {remedy}\n  {listed}"
        )


def _same_kind(stored: np.dtype, wanted: np.dtype) -> bool:
    """Whether both dtypes are of one kind: floating point, signed, unsigned or boolean."""
    kinds = (np.floating, np.signedinteger, np.unsignedinteger, np.bool_)
    kinds_of = lambda dtype: [kind for kind in kinds if jax.numpy.issubdtype(dtype, kind)]  # noqa: E731
    return kinds_of(stored) == kinds_of(wanted)


def _problems(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(wanted.keys() - found.keys()):
        yield f"{name}: missing in the file, expected {wanted[name]}"
    for name in sorted(found.keys() - wanted.keys()):
        yield f"{name}: only in the file, {found[name]}"
    for name in sorted(wanted.keys() & found.keys()):
        if found[name] != wanted[name]:
            yield f"{name}: {found[name]} in the file, expected {wanted[name]}"


def _as_stored(files: TensorFiles, mapping: TensorMapping, leaf: Any) -> jax.ShapeDtypeStruct:
    stored = {files.dtypes[name] for name in mapping.external_shapes(tuple(leaf.shape))}
    dtype = stored.pop() if len(stored) == 1 else np.dtype(np.float32)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))


def _read(files: TensorFiles, mapping: TensorMapping, leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Slice `index` of a native array, read layer by layer."""
    shape = tuple(leaf.shape)
    if not mapping.stacked:
        return np.array(mapping.to_native(files.read(mapping.external_name), shape)[index], dtype=leaf.dtype)
    layers = [
        mapping.to_native(files.read(mapping.external_name.format(layer)), shape[1:])[index[1:]]
        for layer in range(*index[0].indices(shape[0]))
    ]
    return np.stack(layers, dtype=leaf.dtype, casting="unsafe")


def _place(read: Callable[[tuple[slice, ...]], np.ndarray], leaf: Any) -> jax.Array:
    """Array with the sharding of `leaf`; the host holds one device's shard at a time."""
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


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor to write, with its external name and layout."""

    name: str
    spec: TensorSpec
    read: Callable[[], np.ndarray]


def _parts(tree: PyTree, names: Mapping[str, TensorMapping] | None) -> list[_Part]:
    parts = []
    for name, leaf in named_leaves(tree).items():
        mapping = _mapping(names, name, leaf)
        for layer, (external_name, shape) in enumerate(mapping.external_shapes(tuple(leaf.shape)).items()):
            read = functools.partial(_external_tensor, mapping, leaf, layer)
            parts.append(_Part(external_name, TensorSpec(shape, np.dtype(leaf.dtype)), read))
    return parts


def _external_tensor(mapping: TensorMapping, leaf: Any, layer: int) -> np.ndarray:
    return mapping.to_external(_on_host(leaf, layer) if mapping.stacked else _on_host(leaf))


def _split_by_size(specs: Mapping[str, TensorSpec], largest: int) -> list[dict[str, TensorSpec]]:
    """Splits tensors into files of at most `largest` bytes, in order; a larger tensor gets its own file."""
    files: list[dict[str, TensorSpec]] = [{}]
    room = largest
    for name, spec in specs.items():
        if spec.num_bytes > room and files[-1]:
            files.append({})
            room = largest
        files[-1][name] = spec
        room -= spec.num_bytes
    return files


def _on_host(leaf: Any, layer: int | None = None) -> np.ndarray:
    """An array, or one layer of it, gathered to the host."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf if layer is None else leaf[layer], tiled=True)
    if layer is None or not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    gathered = np.empty(leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            gathered[shard.index[1:]] = np.asarray(shard.data[layer - (shard.index[0].start or 0)])
    return gathered
