"""Random streams by name and step: adding one use of randomness does not change the others."""

import zlib

import jax

from vidgen.core.typing import Array, Int, Key

__all__ = ["stream"]


def stream(key: Key[Array, ""], name: str, step: int | Int[Array, ""] | None = None) -> Key[Array, ""]:
    """Key of the stream `name`, folded with `step` if given.

    Equal on every process and in every run: the name is hashed with CRC-32, not with Python's salted hash.

    Args:
      key: a typed key (`jax.random.key`).
      name: purpose of the stream, such as "noise".
      step: training step or layer index, at least 0; may be traced.
    """
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
