"""Attention block by block of the keys: lengths that nothing divides, and how much is in memory at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.array_shapes import array_shapes
from tests.pallas_kernels.attention.cases import exact
from vidgen.ops import attention_blocks
from vidgen.ops.attention_blocks import Blocks, block_score_bytes
from vidgen.pallas_kernels.attention.masks import segment_ranges

SCALE = 8**-0.5


def inputs(queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, n, 3, 8) for n in (queries, keys, keys, queries))
    return tuple(jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes)


def both_passes(query, key, value, cotangent, ranges):
    results = Blocks().forward(query, key, value, scale=SCALE, ranges=ranges)
    gradients = Blocks().backward(query, key, value, *results, cotangent, scale=SCALE, ranges=ranges)
    return *results, *gradients


@pytest.mark.parametrize("keys", [1, 13, 16, 23])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_any_length_against_float64(monkeypatch, keys, masked):
    monkeypatch.setattr(attention_blocks, "_LARGEST", 8)
    arrays = inputs(7, keys)
    ranges, mask = None, np.ones((2, 7, keys), bool)
    if masked:
        own, theirs = (jnp.asarray(np.arange(n)[None].repeat(2, 0) * 3 // n) for n in (7, keys))
        ranges = segment_ranges(own, theirs, jnp.arange(keys)[None].repeat(2, 0) != 2)
        mask = np.asarray(ranges.visible())
    found = jax.jit(both_passes)(*arrays, ranges)
    for one, wanted in zip(found, exact(*arrays, mask), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("keys", [4096, 4099, 4106, 7063, 46_811])
def test_scores_of_at_most_512_keys_are_in_memory(keys):
    arrays = [jax.ShapeDtypeStruct((1, keys, 2, 8), jnp.float32)] * 4
    program = jax.make_jaxpr(lambda *arrays: both_passes(*arrays, None))(*arrays)
    shapes = [shape for shape in array_shapes(program) if keys in shape]
    widest = max(np.prod(shape) for shape in shapes)
    assert widest == 2 * keys * (block_score_bytes(1, keys) // 4) and block_score_bytes(1, keys) <= 4 * 512
    assert widest >= 2 * keys * 256  # Nor are blocks so small that their number is what takes the time.
    # What is filled up is less than a block in all.
    assert attention_blocks._block_count(keys) * block_score_bytes(1, keys) // 4 < keys + 512
