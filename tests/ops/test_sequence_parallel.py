"""Tokens cut over devices attend to each other as on one device, and send only what the method says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.ops.attention import attention
from vidgen.ops.attention_blocks import ATTENTION, Blocks, PartialAttention, merge
from vidgen.ops.key_ranges import KeyRanges, self_attention_ranges
from vidgen.ops.sequence_parallel import SequenceParallel, sequence_attention
from vidgen.pallas_kernels.attention.masks import HIDDEN
from vidgen.parallel.mesh import MeshOptions
from vidgen.preflight.flops import matmul_flops
from vidgen.preflight.hlo import count_collectives

# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

B, S, N, K = 2, 32, 8, 8
METHODS = {
    "gather": SequenceParallel(method="gather"),
    "ulysses": SequenceParallel(method="ulysses"),
    "ring": SequenceParallel(method="ring"),
    "rings of 2 that exchange": SequenceParallel(method="ulysses", ulysses=2),
}
MESH = MeshOptions(data=1, context=4, tensor=2)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def qkv():
    return tuple(jnp.asarray(normal(seed, B, S, N, K)) for seed in range(3))


WEIGHT = normal(3, B, S, N, K)
SEGMENTS = np.sort(np.random.default_rng(4).integers(0, 3, (B, S)), axis=1).astype(np.int32)
KEY_MASK = np.random.default_rng(5).random((B, S)) < 0.7
KEY_MASK[:, [0, -1]] = True
MASKS = {
    "all": {},
    "chunks": {"clip_ids": SEGMENTS, "chunk_ids": np.tile(np.arange(S, dtype=np.int32) // 3, (B, 1))},
    "masked": {"key_mask": KEY_MASK},
    "packed and masked": {"clip_ids": np.where(SEGMENTS == 1, 2, SEGMENTS), "key_mask": KEY_MASK},
}


def ranges_of(masks):
    return self_attention_ranges(**{name: jnp.asarray(mask) for name, mask in masks.items()})


def with_gradients(function, dtype=jnp.float32, weight=WEIGHT):
    """The result and the gradients of a weighted sum of it, of arrays that the function gets as `dtype`."""

    def loss(arrays):
        y = function(*(x.astype(dtype) for x in arrays)).astype(jnp.float32)
        return (y * weight).sum(), y

    return jit(jax.grad(loss, has_aux=True))


def on_one_device(ranges=None, dtype=jnp.float32):
    return with_gradients(functools.partial(attention, ranges=ranges), dtype)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_result_and_gradients_are_those_of_one_device(qkv, options, masks):
    ranges = ranges_of(masks)
    expected = on_one_device(ranges)(qkv)
    with jax.set_mesh(MESH.build()):
        found = with_gradients(functools.partial(sequence_attention, options=options, ranges=ranges))(qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
BOTH = ("clip_ids", "key_mask")


@pytest.mark.parametrize(
    ("method", "context", "masks"),
    [
        ("ring", 2, ("clip_ids", "chunk_ids")),
        ("ulysses", 2, ()),
        ("rings of 2 that exchange", 4, BOTH),
        slow("ring", 2, ()),
        slow("ring", 4, ()),
        slow("ring", 4, BOTH),
        slow("ulysses", 2, BOTH),
        slow("rings of 2 that exchange", 4, ()),
    ],
)
def test_with_kernels_result_and_gradients_are_those_of_one_device(method, context, masks):
    options = METHODS[method]
    shape = (1, 128 * context, 2, 64)
    arrays = tuple(jnp.asarray(normal(seed, *shape)) for seed in range(3))
    weight = normal(3, *shape)
    random = np.random.default_rng(4)
    every = {
        "clip_ids": np.sort(random.integers(0, 3, shape[:2]), axis=1).astype(np.int32),
        "chunk_ids": np.arange(shape[1], dtype=np.int32)[None] // 50,
        "key_mask": random.random(shape[:2]) < 0.7,
    }
    ranges = ranges_of({name: every[name] for name in masks})
    alone = functools.partial(attention, implementation="xla", ranges=ranges)
    expected = with_gradients(alone, weight=weight)(arrays)
    function = functools.partial(
        sequence_attention, options=options, implementation="pallas_tpu", ranges=ranges
    )
    with jax.set_mesh(MeshOptions(data=1, context=context, tensor=1, fsdp=8 // context).build()):
        found = with_gradients(function, weight=weight)
        assert "pallas_call" in str(found.trace(arrays).jaxpr)
        found = found(arrays)

    def close(a, b):
        assert np.sqrt(np.square(a - b).mean() / np.square(b).mean()) <= 2e-6

    jax.tree.map(close, found, expected)


def test_a_ring_falls_back_from_kernels_only_where_none_were_named(qkv, monkeypatch):
    # Kernels of a TPU, which are interpreted here.
    monkeypatch.setattr("vidgen.ops.ring_attention.device_kind", lambda: ("tpu", "TPU v6 lite"))

    def trace(dtype, implementation):
        function = functools.partial(
            sequence_attention, options=METHODS["ring"], implementation=implementation
        )
        return str(with_gradients(function, dtype).trace(qkv).jaxpr)

    with jax.set_mesh(MESH.build()):
        for name in ("attention_forward", "attention_backward"):
            assert name in trace(jnp.float32, "auto")
        assert "pallas_call" not in trace(jnp.float32, "xla")
        assert "pallas_call" not in trace(jnp.float16, "auto")
        with pytest.raises(NotImplementedError, match="float16"):
            trace(jnp.float16, "pallas_tpu")


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (MeshOptions(data=1, context=8), METHODS["ring"]),
        (MeshOptions(data=1, fsdp=2, context=4), METHODS["rings of 2 that exchange"]),
        (MeshOptions(data=1, context=4, tensor=2), SequenceParallel()),
    ],
)
def test_bfloat16_differs_by_its_rounding(qkv, mesh, options):
    expected = on_one_device()(qkv)
    function = functools.partial(sequence_attention, options=options)
    with jax.set_mesh(mesh.build()):
        found = with_gradients(function, jnp.bfloat16)(qkv)
    errors, largest = (
        jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), tree, expected)
        for tree in (found, on_one_device(dtype=jnp.bfloat16)(qkv))
    )
    # No worse than what one device makes of bfloat16.
    jax.tree.map(lambda error, one: np.testing.assert_array_less(error, 1.5 * one), errors, largest)


def test_blocks_are_attention_however_they_are_cut_and_a_query_without_keys_gets_zeros(qkv, monkeypatch):
    query, key, value = qkv
    monkeypatch.setattr("vidgen.ops.attention_blocks._LARGEST", 8)
    low = jnp.zeros((B, S), jnp.int32)

    def attend(keys, mask):
        ranges = KeyRanges(jnp.where(mask[:, keys], 0, HIDDEN), low)
        part = Blocks().forward(query, key[:, keys], value[:, keys], scale=K**-0.5, ranges=ranges)
        return PartialAttention(part[0].reshape(B, S, N * K), part[1])

    mask = jnp.asarray(KEY_MASK)
    mean, log_sum_exp = merge(attend(slice(None, 24), mask), attend(slice(24, None), mask))
    expected = attention(query, key, value, ranges=ranges_of({"key_mask": mask})).reshape(B, S, N * K)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    scores = np.einsum("bsnk,brnk->bnsr", query, key) / np.sqrt(K)
    expected = np.log(np.where(KEY_MASK[:, None, None], np.exp(scores), 0).sum(-1))
    np.testing.assert_allclose(log_sum_exp, expected, rtol=1e-5, atol=1e-5)
    nothing = attend(slice(None), jnp.zeros_like(mask))
    for mean, log_sum_exp in (nothing, merge(nothing, nothing)):
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(log_sum_exp, -np.inf)
    one = attend(slice(None), mask)
    jax.tree.map(np.testing.assert_array_equal, merge(nothing, one), one)


def compiled(options, tokens, context=8):
    """The program of result and gradients for arrays that lie over `context`."""
    shape = (1, tokens, 8, 4)
    mesh = MeshOptions(data=1, context=context, tensor=8 // context).build()
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "context", "tensor"))
        argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

        def loss(query, key, value):
            return jnp.square(sequence_attention(query, key, value, options=options)).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=place)
        return step.lower(argument, argument, argument).compile()


def largest_buffer(program):
    shapes = re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_ulysses_exchanges_and_gathers_nothing():
    counts = count_collectives(compiled(METHODS["ulysses"], 64).as_text())
    # Queries, keys, values and the result, and back; the compiler may join some.
    assert 2 <= counts.pop("all-to-all") <= 8
    counts.pop("all-reduce")  # Of the loss.
    assert not any(counts.values())


def test_a_ring_passes_on_and_gathers_nothing_and_its_memory_is_that_of_a_part():
    tokens, part = 1024, 1024 // 8
    program = compiled(METHODS["ring"], tokens)
    counts = count_collectives(program.as_text())
    # Two arrays forward; backward two in the first turn, then four, two in the last and on the way home.
    assert 2 <= counts.pop("collective-permute") <= 12
    counts.pop("all-reduce")
    assert not any(counts.values())
    assert largest_buffer(program) == part * part * 8  # Scores of one part and another, 8 heads.
    assert largest_buffer(compiled(METHODS["gather"], tokens)) >= part * tokens * 8


def test_with_its_result_saved_a_ring_is_not_run_again(qkv):
    ring = lambda arrays: sequence_attention(*arrays, options=METHODS["ring"])  # noqa: E731

    def flops(policy):
        function = ring if policy is None else jax.checkpoint(ring, policy=policy)
        loss = lambda arrays: jnp.square(function(arrays)).sum()  # noqa: E731
        return matmul_flops(jax.make_jaxpr(jax.grad(loss))(qkv))

    policies = jax.checkpoint_policies
    with jax.set_mesh(MESH.build()):
        assert flops(policies.save_only_these_names(ATTENTION)) == flops(None)
        assert flops(policies.nothing_saveable) == flops(None) + matmul_flops(jax.make_jaxpr(ring)(qkv))


@pytest.mark.parametrize(
    ("options", "heads", "degree"),
    [
        (SequenceParallel(), 40, 8),
        (SequenceParallel(), 12, 4),
        (SequenceParallel(), 3, 1),
        (SequenceParallel(method="ring"), 40, 1),
        (SequenceParallel(method="ulysses", ulysses=4), 12, 4),
    ],
)
def test_auto_exchanges_as_far_as_heads_go(options, heads, degree):
    assert options.degree(8, heads) == degree


def test_what_does_not_divide_is_named_with_what_does(qkv):
    with pytest.raises(ValueError, match=r'ulysses=2 with method "ring"'):
        SequenceParallel(method="ring", ulysses=2)
    with pytest.raises(ValueError, match=r"(?s)8 devices.*12 heads on each.*Use ulysses=1 or 2 or 4, or"):
        METHODS["ulysses"].degree(8, 12)
    odd = tuple(x[:, :30] for x in qkv)
    with jax.set_mesh(MESH.build()):
        with pytest.raises(ValueError, match=r"30 tokens do not divide over context=4.* are 28 or 32"):
            sequence_attention(*odd, options=METHODS["ring"])
        found = jit(sequence_attention)(*odd)
    np.testing.assert_allclose(found, attention(*odd), rtol=1e-5, atol=1e-6)
