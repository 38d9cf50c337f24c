"""32-bit digests of arrays, independent of how and by which processes an array is sharded.

A digest is the sum, modulo 2^32, of a mix of each 32-bit word of the array with its position. The mix is a
bijection of words (the multiply and shift steps of MurmurHash3's finalizer), so a change within one word
always changes the digest, and any other change goes unnoticed with a probability of 2^-32. Each device can
sum over its shard, without moving any data.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

__all__ = ["array_digests"]

_STEP, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_MASK = 2**32 - 1
_BLOCK = 2**15
"""Words mixed at a time on the host: few enough for the CPU's cache."""


def array_digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each array as 8 hexadecimal digits.

    Computed where the arrays are: on accelerators by one compiled program, which reads each array once; on
    the host for CPUs. With several processes all of them must call this, with the same names in the same
    order.
    """
    values = {name: _plain_array(array) for name, array in arrays.items()}
    on_device = {n: x for n, x in values.items() if isinstance(x, jax.Array) and _platform(x) != "cpu"}
    sums = dict(zip(on_device, device_digests(list(on_device.values())), strict=True))
    on_host = [name for name in values if name not in sums]
    sums |= zip(on_host, _host_digests([values[name] for name in on_host]), strict=True)
    return {name: f"{sums[name]:08x}" for name in arrays}


def device_digests(arrays: Sequence[jax.Array]) -> list[int]:
    """Digests computed by one compiled program on the devices that hold the arrays."""
    if not arrays:
        return []
    return [int(x) for x in jax.device_get(_mixed(list(arrays)))]


@jax.jit
def _mixed(arrays: list[Array]) -> list[UInt32[Array, ""]]:
    return [_mixed_sum(array) for array in arrays]


def _mixed_sum(array: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + iota * jnp.uint32(stride * _STEP & _MASK)
    mixed = words ^ position
    mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(_FIRST)
    mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(_SECOND)
    return mixed.sum(dtype=jnp.uint32)


def _host_digests(arrays: Sequence[jax.Array | np.ndarray]) -> list[int]:
    partial = [_host_sum(array) for array in arrays]
    sharded = [isinstance(x, jax.Array) and not x.is_fully_addressable for x in arrays]
    if any(sharded):
        gathered = multihost_utils.process_allgather(np.array(partial, np.uint32))
        total = np.reshape(gathered, (-1, len(partial))).sum(axis=0, dtype=np.uint32)
        partial = [
            int(t) if is_sharded else p for t, p, is_sharded in zip(total, partial, sharded, strict=True)
        ]
    return partial


def _host_sum(array: jax.Array | np.ndarray) -> int:
    """Digest of the shards that this process holds; replicated shards count once."""
    if not isinstance(array, jax.Array):
        return _sum_of_part(np.asarray(array), (0,) * np.ndim(array), np.shape(array))
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(s.start or 0 for s in shard.index)
            total += _sum_of_part(np.asarray(shard.data), start, array.shape)
    return total & _MASK


def _sum_of_part(part: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Contribution of a part that begins at `start` to the digest of an array of `shape`."""
    part = np.ascontiguousarray(part).reshape(part.shape)
    size = part.dtype.itemsize
    unsigned = np.dtype({1: np.uint8, 2: np.uint16}.get(size, np.uint32))
    per_item = size // unsigned.itemsize
    words = part.reshape(-1).view(unsigned).reshape(*part.shape, per_item)
    if part.shape == shape:  # The full array: flattened, so that blocks reach their full length.
        return _sum_of_words(words.reshape(-1), 0, (1,))
    strides = _strides((*shape, per_item))
    offset = sum(i * stride for i, stride in zip(start, strides, strict=False))
    return _sum_of_words(words, offset, strides)


def _sum_of_words(words: np.ndarray, offset: int, strides: tuple[int, ...]) -> int:
    row_size = math.prod(words.shape[1:])
    if row_size > _BLOCK:
        sums = (_sum_of_words(w, offset + i * strides[0], strides[1:]) for i, w in enumerate(words))
        return sum(sums) & _MASK
    count = max(1, _BLOCK // max(row_size, 1))
    positions = np.zeros((min(count, len(words)), *words.shape[1:]), np.uint32)
    for axis, (length, stride) in enumerate(zip(positions.shape, strides, strict=True)):
        along = np.arange(length, dtype=np.uint32) * np.uint32(stride * _STEP & _MASK)
        positions += along.reshape(-1, *(1,) * (words.ndim - 1 - axis))
    total = 0
    for first in range(0, len(words), count):
        block = words[first : first + count]
        begin = np.uint32((offset + first * strides[0]) * _STEP & _MASK)
        mixed = positions[: len(block)] + begin
        mixed ^= block
        mixed ^= mixed >> np.uint32(16)
        mixed *= np.uint32(_FIRST)
        mixed ^= mixed >> np.uint32(13)
        mixed *= np.uint32(_SECOND)
        total += int(mixed.sum(dtype=np.uint32))
    return total & _MASK


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _plain_array(array: Any) -> jax.Array | np.ndarray:
    if isinstance(array, jax.Array):
        return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return np.asarray(array)


def _platform(array: jax.Array) -> str:
    return next(iter(array.sharding.device_set)).platform
