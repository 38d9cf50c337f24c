"""Tensors of safetensors files, one at a time: read on demand, written as they are produced."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vidgen.core.errors import UserError
from vidgen.core.files import parse_json, read_json, replacing

__all__ = ["PICKLES", "TensorFiles", "TensorSpec", "WeightsError", "is_plain_name", "write_tensors"]

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
"""Suffixes of pickles, which can run any code when loaded; they are never loaded here."""

_MAX_FILE_NAME = 255
"""Bytes that file systems allow."""
_MAX_HEADER_BYTES = 16 << 20
"""A header has about 100 bytes per tensor; models with thousands of tensors have less than 1 MB."""

_MAX_NAME = 500

_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightsError(UserError):
    """Weights that do not fit the model; the message names every tensor concerned."""


class TensorFiles:
    """Tensors of one file, or of several listed in `NAME.index.json` (Hugging Face's layout).

    Arrays are views of memory-mapped files: data that is not accessed is not read. (The NumPy reader of
    safetensors 0.8 supports neither bfloat16 nor 8-bit floats.) Files may be symbolic links to regular files,
    as in Hugging Face's cache; an index may only name files in its folder.

    Attributes:
      path: the file, or the index.
      files: paths of the safetensors files.
      shapes: shape of each tensor, by name.
      dtypes: dtype of each tensor, by name.
      metadata: strings in the header, or in all headers if there are several files.
    """

    def __init__(self, path: pathlib.Path | str):
        """Reads the headers.

        Raises:
          FileNotFoundError: neither the file nor an index of that name exists, or a listed file is missing;
            the message mentions pickles found instead.
          WeightsError: a file is incomplete, not a safetensors file, or does not hold what the index lists.
          UserError: the index is not a valid JSON index, or names a file outside its folder.
        """
        path = pathlib.Path(path)
        index = path.with_name(path.name + ".index.json")
        self.path = path if path.exists() or not index.exists() else index
        files = _listed(index) if self.path == index else {path: None}
        self.files = tuple(files)
        self._places: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.metadata: dict[str, str] = {}
        for file, expected in files.items():
            self._open(file, expected)

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, read-only."""
        return self._places[name].view(self.dtypes[name]).reshape(self.shapes[name])

    def _open(self, path: pathlib.Path, expected: set[str] | None) -> None:
        header, begin = _header(path)
        self.metadata |= header.pop("__metadata__", {})
        if expected is not None and (missing := sorted(expected - header.keys())):
            raise WeightsError(f"{path} lacks {missing[:10]}, which {self.path.name} lists for it")
        if twice := sorted(self.shapes.keys() & header.keys()):
            raise WeightsError(f"{path} holds {twice[:10]}, which another file of {self.path.name} holds too")
        data = np.memmap(path, np.uint8, mode="r", offset=begin) if header else np.zeros(0, np.uint8)
        for name, entry in header.items():
            if len(name) > _MAX_NAME or not name.isprintable():
                raise WeightsError(
                    f"{path}: {name[:80]!r} ({len(name)} characters) is not a valid tensor name"
                )
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(
                    f"{path}: {name} is of type {entry['dtype']}; expected one of {sorted(_DTYPES)}"
                )
            start, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not end - start == math.prod(shape) * dtype.itemsize:
                raise WeightsError(
                    f"{path}: {name} has {end - start} bytes, which do not match {shape} of {dtype}"
                )
            self._places[name], self.shapes[name], self.dtypes[name] = data[start:end], shape, dtype


def is_plain_name(name: Any) -> bool:
    """Whether `name`, taken from another file, names a file in the same folder and nothing else."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    return len(name.encode(errors="surrogatepass")) <= _MAX_FILE_NAME


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Header of a file, validated by safetensors, and the byte offset of the first tensor."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected weights in safetensors format{_beside(path)}")
    if not path.is_file():
        raise WeightsError(f"{path} is no regular file: expected weights in safetensors format")
    again = "write it again, or download it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Checked before safetensors reads it: in a damaged file the length may be anything.
        if length > _MAX_HEADER_BYTES:
            raise WeightsError(f"{path} is no safetensors file (a header of {length:,} bytes): {again}")
        text = file.read(length)
    try:
        with safe_open(path, framework="numpy"):
            pass  # Validates sizes, and that offsets neither overlap nor leave gaps.
    except SafetensorError as error:
        raise WeightsError(f"{path} is no complete safetensors file ({str(error)[:300]}): {again}") from error
    try:
        header = parse_json(text, str(path))
    except UserError as error:
        raise WeightsError(f"{error}: {again}") from error
    return header, 8 + length


def _beside(path: pathlib.Path) -> str:
    """Remark on pickles found next to a missing file; empty if there are none."""
    pickles = [p.name for p in path.parent.glob("*") if p.suffix in PICKLES] if path.parent.is_dir() else []
    if not pickles:
        return ""
    return (
        f". There is {min(pickles)}, a pickle, which can run any code when it is loaded and is never loaded "
        "here: get the safetensors files of the same model"
    )


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: pathlib.Path | str,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file tensor by tensor, with one of them in memory at a time; the file appears atomically.

    (The writer of safetensors takes all tensors at once.)

    Args:
      specs: by name, in the order of `tensors`.
      metadata: strings for the header.

    Raises:
      OSError: e.g. the disk is full; an existing file is unchanged.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype), name
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _listed(index: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    remedy = "download it again"
    weight_map = read_json(index, remedy=remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is not a mapping from tensors to files: {remedy}")
    files: dict[pathlib.Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: {name} is said to be in {str(file)[:200]!r}; expected the name of a safetensors "
                "file in the same folder"
            )
        names = files.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return files
