"""Manifest of a checkpoint: dtypes, shapes and digests of its arrays, checksums of its JSON parts."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vidgen.ckpt.digests import array_digests

__all__ = ["Manifest", "StoredArray"]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Shape, dtype name and digest ("" if there is none) of a stored array."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The arrays of a checkpoint and the checksums of its JSON parts, by name."""

    arrays: Mapping[str, StoredArray]
    parts: Mapping[str, int]

    @classmethod
    def of(cls, arrays: Mapping[str, Any], parts: Mapping[str, Any]) -> "Manifest":
        """Manifest of arrays and parts to be saved; with several processes all of them must call this."""
        digests = array_digests(arrays)
        return cls(
            arrays={name: StoredArray(*_stored_as(x), digests[name]) for name, x in arrays.items()},
            parts={name: _checksum(value) for name, value in parts.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, with a checksum of the manifest."""
        values = {
            "arrays": {name: [list(x.shape), x.dtype, x.digest] for name, x in self.arrays.items()},
            "parts": dict(self.parts),
        }
        return values | {"checksum": _checksum(values)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """Inverse of `to_json`.

        Raises:
          ValueError: the values do not match their checksum.
        """
        rest = {name: value for name, value in values.items() if name != "checksum"}
        if values.get("checksum") != _checksum(rest):
            raise ValueError("its manifest differs from the saved one")
        arrays = {
            name: StoredArray(tuple(shape), dtype, digest)
            for name, (shape, dtype, digest) in rest["arrays"].items()
        }
        return cls(arrays=arrays, parts=rest["parts"])

    def changed(self, arrays: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
        """Names of the arrays and parts that differ from what was saved; all processes must call this."""
        found = array_digests(arrays)
        names = [name for name in found if found[name] != self.arrays[name].digest]
        return names + [name for name in parts if _checksum(parts[name]) != self.parts[name]]


def _stored_as(array: Any) -> tuple[tuple[int, ...], str]:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return tuple(jnp.shape(array)), str(jnp.result_type(array))


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
