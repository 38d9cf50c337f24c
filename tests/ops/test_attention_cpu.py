import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.ops import attention_cpu
from vidgen.ops.attention import attention
from vidgen.ops.key_ranges import cross_attention_ranges, self_attention_ranges
from vidgen.pallas_kernels.attention.masks import causal_ranges
from vidgen.parallel.mesh import MeshOptions

SCALE = 0.3
KEY_MASK = np.random.default_rng(1).uniform(size=(2, 29)) < 0.7
SEGMENTS = (
    np.repeat([[0, 1, 2], [0, 2, 1]], [20, 9, 8], axis=1),
    np.repeat([[2, 0, 1]] * 2, [7, 14, 8], axis=1),
)
"""Of 37 queries and 29 keys."""
CHUNKS = tuple(np.tile(np.arange(n) // 4, (2, 1)) for n in (37, 29))


def ranges_and_mask(kind):
    """Key ranges, and the mask that they mean."""
    mask, options = np.ones((2, 37, 29), bool), {}
    if kind == "chunks":
        return causal_ranges(*map(jnp.asarray, CHUNKS)), CHUNKS[0][:, :, None] >= CHUNKS[1][:, None]
    if kind in ("some keys", "both"):
        mask, options["key_mask"] = mask & KEY_MASK[:, None], jnp.asarray(KEY_MASK)
    if kind in ("segments", "both"):
        mask = mask & (SEGMENTS[0][:, :, None] == SEGMENTS[1][:, None])
        options["clip_ids"] = tuple(map(jnp.asarray, SEGMENTS))
    return cross_attention_ranges(37, **options), mask


def reference(query, key, value, weight, mask):
    """Result, and gradients of its sum weighted by `weight`, in float64, written out."""
    query, key, value, weight = (
        x.astype(np.float64).transpose(0, 2, 1, 3) for x in (query, key, value, weight)
    )
    scores = np.where(mask[:, None], SCALE * query @ key.swapaxes(-1, -2), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y, dp = p @ value, weight @ value.swapaxes(-1, -2)
    ds = SCALE * p * (dp - (dp * p).sum(-1, keepdims=True))
    gradients = ds @ key, ds.swapaxes(-1, -2) @ query, p.swapaxes(-1, -2) @ weight
    return tuple(x.transpose(0, 2, 1, 3) for x in (y, *gradients))


def with_gradients(attend, weight):
    """A compiled function of query, key and value that gives the result and their gradients."""

    def loss(*inputs):
        y = attend(*inputs)
        return (y * weight).sum(), y

    def call(*inputs):
        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return (y, *gradients)

    return jax.jit(call)


@pytest.fixture(scope="module")
def inputs():
    """Query, key, value, and a weight for the result: 2 clips, 6 heads."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, length, 6, 8)).astype(np.float32) for length in (37, 29, 29, 37)]


@pytest.mark.parametrize("block", [512, 4096], ids=["13 queries at a time", "3 heads at a time"])
@pytest.mark.parametrize("kind", ["all", "some keys", "segments", "both", "chunks"])
def test_result_and_gradients_against_float64(inputs, kind, block, monkeypatch):
    monkeypatch.setattr(attention_cpu, "_BLOCK", block)
    *qkv, weight = inputs
    cut = attention_cpu._Cut(*map(jnp.asarray, qkv[:2]))
    assert (cut.group, cut.count, cut.rows) == {512: (1, 3, 13), 4096: (3, 1, 37)}[block]
    ranges, mask = ranges_and_mask(kind)
    assert mask.any(-1).all()
    found = with_gradients(functools.partial(attention, scale=SCALE, ranges=ranges), weight)(*qkv)
    for array, expected in zip(found, reference(*inputs, mask=mask), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=4e-6)


def test_a_query_that_sees_no_key_has_what_it_has_elsewhere(inputs, monkeypatch):
    *qkv, weight = inputs
    segments = jnp.full((2, 37), 5).at[:, 3:].set(SEGMENTS[0][:, 3:]), jnp.asarray(SEGMENTS[1])
    call = functools.partial(attention, scale=SCALE, ranges=cross_attention_ranges(37, clip_ids=segments))
    expected = with_gradients(call, weight)(*qkv)
    monkeypatch.setattr(attention_cpu, "_BLOCK", 512)
    found = with_gradients(call, weight)(*qkv)
    for array, elsewhere in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, elsewhere, rtol=1e-5, atol=4e-6)


def test_under_vmap_it_is_each_alone(inputs, monkeypatch):
    monkeypatch.setattr(attention_cpu, "_BLOCK", 512)
    *qkv, weight = (x[:, :17, :2, None] for x in inputs)
    call = with_gradients(functools.partial(attention, scale=SCALE), weight[0].swapaxes(1, 2))
    swapped = [jnp.asarray(x.transpose(0, 3, 1, 2, 4)) for x in qkv]  # clips [1 s n k]
    together = jax.vmap(call)(*swapped)
    for index in range(2):
        alone = call(*(x[index] for x in swapped))
        for array, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(array[index], expected, rtol=1e-5, atol=2e-6)


LARGE = jax.ShapeDtypeStruct((1, 1280, 8, 64), jnp.float32)


def program(dtype=jnp.float32, platform="cpu", **options):
    x = jax.ShapeDtypeStruct(LARGE.shape, dtype)
    mask = jax.ShapeDtypeStruct((1, 1280), jnp.bool_)

    @jax.jit
    def call(x, mask, options):
        return attention(x, x, x, ranges=self_attention_ranges(key_mask=mask), **options)

    return call.trace(x, mask, options).lower(lowering_platforms=(platform,)).as_text()


def test_large_ones_in_float32_on_cpus_have_no_array_of_all_scores():
    assert "8x1280x1280xf32" not in program() and "<1x1280x1280xf32" in program()
    bias = jax.ShapeDtypeStruct((1, 8, 1280, 1280), jnp.float32)
    for text in (program(jnp.bfloat16), program(bias=bias), program(platform="tpu")):
        assert "8x1280x1280xf32" in text and "<1x1280x1280xf32" not in text


@pytest.mark.parametrize("remat", [False, True])
def test_no_scores_are_kept_for_the_backward_pass(remat):
    attend = lambda x: attention(x, x, x)  # noqa: E731
    if remat:
        attend = jax.checkpoint(attend, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(attend, x)[1], LARGE))
    assert kept and max(leaf.size for leaf in kept) <= LARGE.size


def test_over_a_mesh_nothing_but_keys_and_values_is_gathered(inputs, monkeypatch):
    monkeypatch.setattr(attention_cpu, "_BLOCK", 512)
    query, key, value, weight = (x[:, :28] for x in inputs)
    ranges = jax.tree.map(lambda x: x[:, :28], ranges_and_mask("both")[0])
    call = with_gradients(functools.partial(attention, scale=SCALE, ranges=ranges), weight)
    expected = call(query, key, value)
    with jax.set_mesh(MeshOptions(data=2, context=2, tensor=2).build()):
        call = with_gradients(functools.partial(attention, scale=SCALE, ranges=ranges), weight)
        found = call(query, key, value)
    for array, alone in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, alone, rtol=1e-5, atol=4e-6)
