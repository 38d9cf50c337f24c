import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vidgen.ckpt import digests
from vidgen.ckpt.digests import array_digests, device_digests
from vidgen.parallel.mesh import MeshOptions

DTYPES = ["float32", "bfloat16", "uint8", "int32", "bool", "float8_e4m3fn", "complex64"]


def array(dtype, shape=(8, 6, 4), seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 20).astype(jnp.dtype(dtype))


def reference(x):
    """Word by word, in Python's integers."""
    x = np.ascontiguousarray(x)
    unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    total = 0
    for place, word in enumerate(x.reshape(-1).view(unsigned).tolist()):
        mixed = word ^ (place * 0x9E3779B1 % 2**32)
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        total += mixed
    return f"{total % 2**32:08x}"


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES)
def test_hosts_and_devices_give_the_definition_however_an_array_is_sharded(dtype, monkeypatch):
    monkeypatch.setattr(digests, "_BLOCK", 10)
    x = array(dtype)
    expected = reference(x)
    assert array_digests({"x": x}) == {"x": expected}
    mesh = MeshOptions(fsdp=4, tensor=2).build()
    for spec in (PartitionSpec(), PartitionSpec("fsdp", None, "tensor"), PartitionSpec(None, "tensor")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert array_digests({"x": placed}) == {"x": expected}
        assert [f"{d:08x}" for d in device_digests([placed])] == [expected]


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 70_000), (40_000,)])
def test_odd_shapes(shape):
    x = array("float32", shape)
    assert array_digests({"x": x, "y": jnp.asarray(x)}) == dict.fromkeys("xy", reference(x))
    assert [f"{d:08x}" for d in device_digests([jnp.asarray(x)])] == [reference(x)]


def test_keys_of_random_streams_have_digests():
    key = jax.random.key(3)
    assert array_digests({"k": key}) == {"k": reference(np.asarray(jax.random.key_data(key)))}


def test_each_flipped_bit_and_common_damage_change_the_digest():
    x = array("float32", (64,))
    found = {array_digests({"x": x})["x"]}
    for bit in range(64 * 32):
        flipped = x.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        found.add(array_digests({"x": flipped})["x"])
    signs = x.copy()
    signs[:2] *= -1
    found |= {array_digests({"x": other})["x"] for other in (signs, x[::-1], np.roll(x, 1), 0 * x)}
    assert len(found) == 64 * 32 + 5
