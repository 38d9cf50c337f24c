"""Tensors of safetensors files, one by one: read from the disk when asked for, written as they come."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vidgen.core.errors import UserError

__all__ = ["TensorFiles", "TensorSpec", "WeightsError", "write_tensors"]

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
    """A file of weights that does not fit the model; the message names every tensor concerned."""


class TensorFiles:
    """The tensors of one file, or of several that `NAME.index.json` lists (Hugging Face's layout).

    Arrays are views of the files, mapped into memory: what is not looked at is not read. (The library's own
    reader for numpy, 0.8, knows neither bfloat16 nor 8-bit floats.)

    Attributes:
      path: of the file, or of the index.
      shapes: of the tensors, by name.
      dtypes: as `shapes`.
    """

    def __init__(self, path: pathlib.Path | str):
        """Reads the headers.

        Raises:
          FileNotFoundError: there is neither the file nor an index of that name, or a file that it lists.
          WeightsError: a file is not whole, or not a safetensors file, or does not hold what the index says.
        """
        path = pathlib.Path(path)
        index = path.with_name(path.name + ".index.json")
        self.path = path if path.exists() or not index.exists() else index
        files = _listed(index) if self.path == index else {path: None}
        self._places: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for file, expected in files.items():
            self._open(file, expected)

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name, which must not be written to."""
        return self._places[name].view(self.dtypes[name]).reshape(self.shapes[name])

    def _open(self, path: pathlib.Path, expected: set[str] | None) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: expected weights in safetensors format")
        try:
            with safe_open(path, framework="numpy"):
                pass  # It checks that the file is whole.
        except SafetensorError as error:
            raise WeightsError(f"{path} is no complete safetensors file ({error}): write it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if expected is not None and (missing := sorted(expected - header.keys())):
            raise WeightsError(f"{path} lacks {missing}, which {self.path.name} says it holds")
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if header else np.zeros(0, np.uint8)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(f"{path}: {name} is of type {entry['dtype']}; known are {sorted(_DTYPES)}")
            start, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            assert end - start == math.prod(shape) * dtype.itemsize
            self._places[name], self.shapes[name], self.dtypes[name] = data[start:end], shape, dtype


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor."""

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
    """Writes a file tensor by tensor, so that one of them is in memory at a time; the file appears whole.

    (The library's own writer takes all of them at once.)

    Args:
      specs: by name, in the order in which they come.
      metadata: strings for the header.

    Raises:
      OSError: the disk is full, say; what was there before is still there.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
                assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype), name
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _listed(index: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    files: dict[pathlib.Path, set[str] | None] = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        names = files.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return files
