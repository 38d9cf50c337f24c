"""The TPU kernels, interpreted: all cases on small blocks, and the shipped blocks in a slow test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.attention.cases import AttentionCases, close_log_sum_exp, error, exact
from vidgen.pallas_kernels.attention import block_schedule, reference, specs, tpu
from vidgen.pallas_kernels.attention.masks import BlockMask, causal_ranges, segment_ranges
from vidgen.pallas_kernels.attention.specs import GENERATIONS, BlockSizes
from vidgen.pallas_kernels.attention.tpu_layout import Heads

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SMALL = BlockSizes(queries=128, keys=256, query_unit=128, key_unit=128)


def jitted(function, **options):
    """Compiled: the interpreter is slow otherwise."""

    @functools.wraps(function)
    def call(*arrays, scale=None, ranges=None, block_mask=None):
        run = jax.jit(lambda arrays, masks: function(*arrays, scale=scale, **masks, **options))
        return run(arrays, {"ranges": ranges, "block_mask": block_mask})

    return call


class TestReference(AttentionCases):
    """What explains the kernels is tested as they are."""

    forward = staticmethod(jitted(reference.forward))
    backward = staticmethod(jitted(reference.backward))
    unsupported_head_dims = ()


class TestWideMXU(AttentionCases):
    options = {"generation": "v6e", "blocks": SMALL, "interpret": True}  # noqa: RUF012
    forward = staticmethod(jitted(tpu.forward, **options))
    backward = staticmethod(jitted(tpu.backward, **options))
    unsupported_head_dims = (512,)
    lengths = ((128, 256), (100, 37), (1, 200), (130, 1), (67, 259))
    # Compiled for many seconds each; other cases and other kernels have most of what they show.
    slow = (
        "test_block_mask",
        "test_block_mask_of_larger_blocks",
        "test_causal_over_frames",
        "test_causal_within_segments_and_a_window[0]",
        "test_gradients_of_parts_of_the_keys_add_up",
        "test_head_dimensions[96-bfloat16]",
        "test_head_dimensions[128-bfloat16]",
        "test_head_dimensions[256-bfloat16]",
        "test_large_scores_of_both_signs",
        "test_lengths[(128, 256)-float32]",
        "test_lengths[(100, 37)-float32]",
        "test_lengths[(1, 200)-float32]",
        "test_nothing_is_seen[hidden]",
        "test_nothing_is_seen[no blocks]",
        "test_scale",
        "test_segments_of_one_token",
        "test_the_same_twice",
    )


@pytest.mark.parametrize("heads", [1, slow(2)])
def test_narrow_mxu(heads):
    """Gradients summed tokens first, weights summed by additions: what v5e and v5p do otherwise."""
    arrays = inputs(200, 300, heads=heads, dim=128 // heads)
    codes = (jnp.asarray(np.arange(n)[None] // 90, jnp.int32) for n in (200, 300))
    ranges = segment_ranges(*codes)
    options = {"generation": "v5e", "blocks": SMALL, "interpret": True}
    results = jitted(tpu.forward, **options)(*arrays[:3], ranges=ranges)
    gradients = jitted(tpu.backward, **options)(*arrays[:3], *results, arrays[3], ranges=ranges)
    expected = exact(*arrays, np.asarray(ranges.visible()))
    assert all(error(a, b) <= 2e-6 for a, b in zip((*results, *gradients), expected, strict=True))


def inputs(queries, keys, heads=1, dim=128, dtype="float32", batch=1):
    rng = np.random.default_rng(0)
    shapes = ((batch, n, heads, dim) for n in (queries, keys, keys, queries))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def test_rows_of_which_the_sum_overflows_are_computed_anew():
    """One key of the second unit lies 2**150 above those from which the reference is taken."""
    query, key, value, _ = inputs(128, 512)
    query = query.at[..., 0].set(10.0).at[:, 64:, :, 0].set(0.0)
    key = key.at[..., 0].set(0.0).at[:, 300, :, 0].set(150.0)
    scores = np.einsum("bsnk,brnk->bnsr", query, key) / np.sqrt(128) * np.log2(np.e)
    assert scores[0, 0, :64].max() - scores[0, 0, :64, :128].max() > 128
    call = {"generation": "v6e", "interpret": True, "blocks": SMALL}
    output, log_sum_exp = jax.jit(functools.partial(tpu.forward, **call))(query, key, value)
    expected = exact(query, key, value, query, np.ones((1, 128, 512), bool))
    assert error(output, expected[0]) <= 2e-6
    np.testing.assert_allclose(log_sum_exp, expected[1], rtol=1e-6)


def test_the_mark_of_a_row_is_what_calls_for_the_exact_kernel(monkeypatch):
    """Without the second pass, the rows of the test above are NaN: the guard is what saves them."""
    query, key, value, _ = inputs(128, 512)
    query = query.at[..., 0].set(10.0)
    key = key.at[..., 0].set(0.0).at[:, 300, :, 0].set(150.0)
    monkeypatch.setattr(tpu.lax, "cond", lambda _, again, keep, *results: keep(*results))
    log_sum_exp = tpu.forward(query, key, value, generation="v6e", interpret=True, blocks=SMALL)[1]
    assert np.isnan(log_sum_exp).all()


def test_a_reference_is_raised_between_blocks_without_the_exact_kernel(monkeypatch):
    query, key, value, _ = inputs(128, 1024)
    query = query.at[..., 0].set(10.0)
    steps = jnp.repeat(jnp.arange(4.0), 256)[None, :, None]
    key = key.at[..., 0].set(60.0 * steps)  # 2**76 from block to block
    monkeypatch.setattr(tpu.lax, "cond", lambda _, again, keep, *results: keep(*results))
    output, log_sum_exp = tpu.forward(query, key, value, generation="v6e", interpret=True, blocks=SMALL)
    expected = exact(query, key, value, query, np.ones((1, 128, 1024), bool))
    assert error(output, expected[0]) <= 1e-4
    np.testing.assert_allclose(log_sum_exp, expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("generation", "heads", "dim", "at_once"),
    [
        ("v5e", 4, 128, 2),
        slow("v6e", 4, 64, 2),
        slow("v6e", 3, 128, 1),
        slow("v5e", 4, 64, 2),
        slow("v6e", 4, 128, 2),
        slow("v5e", 3, 128, 1),
    ],
)
def test_several_heads_at_once(generation, heads, dim, at_once):
    """As many as divide what there are."""
    arrays = query, key, value, _ = inputs(200, 300, heads=heads, dim=dim)
    blocks = dataclasses.replace(SMALL, heads=2)
    assert Heads.of(query, blocks.heads).together == at_once * (2 if dim == 64 else 1)
    ranges = segment_ranges(*(jnp.asarray(np.arange(n)[None] // 170, jnp.int32) for n in (200, 300)))
    options = {"generation": generation, "blocks": blocks, "interpret": True}
    forward = jitted(tpu.forward, **options)
    results = forward(query, key, value, ranges=ranges)
    gradients = jitted(tpu.backward, **options)(*arrays[:3], *results, arrays[3], ranges=ranges)
    expected = exact(*arrays, np.asarray(ranges.visible()))
    assert all(error(a, b) <= 2e-6 for a, b in zip((*results, *gradients), expected, strict=True))
    # Rows of one head whose sums overflow are computed anew, where they belong.
    query = query.at[:, :64, 1, 0].set(10.0)
    key = key.at[:, :, 1, 0].set(0.0).at[:, 150, 1, 0].set(15.0 * np.sqrt(dim))
    expected = exact(query, key, value, query, np.asarray(ranges.visible()))
    output, log_sum_exp = forward(query, key, value, ranges=ranges)
    assert error(output, expected[0]) <= 2e-6 and error(log_sum_exp, expected[1]) <= 2e-6


def test_as_many_heads_at_once_as_have_their_gradients_fit():
    together = {}
    for length in (8192, 65536, 131072):
        tokens = jax.ShapeDtypeStruct((1, length, 4, 128), jnp.bfloat16)
        sizes = specs.block_sizes("v6e", "backward", head_dim=128, bits=16, masked=True)
        together[length] = tpu.Call.of(
            tokens, tokens, "backward", masked=False, generation="v6e", blocks=sizes
        ).heads.together
    assert together == {8192: 4, 65536: 2, 131072: 1}
    tokens = jax.ShapeDtypeStruct((1, 10**6, 4, 128), jnp.bfloat16)
    call = tpu.Call.of(tokens, tokens, "backward", masked=False, generation="v6e")
    assert 131072 < call.queries < 10**6 and call.queries % call.blocks.queries == 0


@pytest.mark.parametrize("kind", [slow("all"), "segments", slow("frames"), "blocks"])
def test_queries_of_which_the_gradients_do_not_fit_at_once(monkeypatch, kind):
    """In parts, of which the last is not full."""
    vmem_bytes = 11000 << 10
    monkeypatch.setitem(GENERATIONS, "v6e", dataclasses.replace(GENERATIONS["v6e"], vmem_bytes=vmem_bytes))
    arrays = inputs(1100, 300, batch=2)
    own, theirs = (jnp.arange(n)[None].repeat(2, 0) * 7 // n for n in (1100, 300))
    options = {}
    if kind in ("segments", "frames"):
        options["ranges"] = (segment_ranges if kind == "segments" else causal_ranges)(own, theirs)
        mask = options["ranges"].visible()
    elif kind == "blocks":
        blocks = jnp.asarray(np.random.default_rng(2).random((-(-1100 // 256), 2)) < 0.5)
        options["block_mask"] = BlockMask(blocks=blocks, query_size=256, key_size=256)
        mask = options["block_mask"].visible(1100, 300)[None].repeat(2, 0)
    else:
        mask = np.ones((2, 1100, 300), bool)
    kernel = {"generation": "v6e", "blocks": SMALL}
    call = tpu.Call.of(*arrays[:2], "backward", masked=False, block_mask=options.get("block_mask"), **kernel)
    assert 1 < -(-1100 // call.queries) < 5 and 1100 % call.queries
    *results, d_query, d_key, d_value = exact(*arrays, np.asarray(mask))
    given = (*arrays[:3], *(jnp.asarray(x, jnp.float32) for x in results), arrays[3])
    gradients = jitted(tpu.backward, interpret=True, **kernel)(*given, **options)
    expected = (d_query, d_key, d_value)
    assert all(error(a, b) <= 2e-6 for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("kind", [slow("all"), slow("segments"), "frames", slow("blocks")])
def test_more_blocks_than_can_be_listed(monkeypatch, kind):
    """Both passes take the queries in parts, of which the last is not full."""
    monkeypatch.setattr(block_schedule, "_MOST", 14)
    query, key, value, cotangent = inputs(800, 500, batch=2)
    # The sum of one row overflows, and the exact kernel computes it anew.
    query = query.at[..., 0].set(0.0).at[1, 700, 0, 0].set(10.0)
    key = key.at[..., 0].set(0.0).at[1, 450, 0, 0].set(150.0)
    own, theirs = (jnp.arange(n)[None].repeat(2, 0) * 5 // n for n in (800, 500))
    options, mask = {}, np.ones((2, 800, 500), bool)
    if kind in ("segments", "frames"):
        options["ranges"] = (segment_ranges if kind == "segments" else causal_ranges)(own, theirs)
        mask = np.asarray(options["ranges"].visible())
    elif kind == "blocks":
        blocks = jnp.asarray(np.random.default_rng(2).random((7, 2)) < 0.6)
        options["block_mask"] = BlockMask(blocks=blocks, query_size=128, key_size=256)
        mask = np.asarray(options["block_mask"].visible(800, 500))[None].repeat(2, 0)
    kernel = {"generation": "v6e", "blocks": SMALL}
    shapes = {"masked": "ranges" in options, "block_mask": options.get("block_mask")}
    assert tpu.Call.of(query, key, "forward", **shapes, **kernel).queries == 384
    assert tpu.Call.of(query, key, "backward", **shapes, **kernel).queries == (800 if kind == "all" else 384)
    results = jitted(tpu.forward, interpret=True, **kernel)(query, key, value, **options)
    gradients = jitted(tpu.backward, interpret=True, **kernel)(
        query, key, value, *results, cotangent, **options
    )
    expected = exact(query, key, value, cotangent, mask)
    close_log_sum_exp(results[1], expected[1], 2e-6)
    for found, wanted in zip((results[0], *gradients), (expected[0], *expected[2:]), strict=True):
        assert error(found, wanted) <= 2e-6


@pytest.mark.parametrize(("generation", "masked"), [("v5e", True), ("v6e", False)])
def test_a_minute_at_480p_in_one_row(generation, masked):
    """241 latent frames of 30 x 52 tokens, at the block sizes that are shipped."""
    tokens = jax.ShapeDtypeStruct((1, 241 * 1560, 12, 128), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((1, 12, tokens.shape[1]), jnp.float32)
    segments = jax.ShapeDtypeStruct(tokens.shape[:2], jnp.int32)

    def both(query, log_sum_exp, segments):
        ranges = segment_ranges(segments, segments) if masked else None
        options = {"ranges": ranges, "generation": generation}
        output, _ = tpu.forward(query, query, query, **options)
        return tpu.backward(query, query, query, output, log_sum_exp, query, **options)

    assert [x.shape for x in jax.eval_shape(both, tokens, rows, segments)] == [tokens.shape] * 3


@pytest.mark.parametrize("masked", [slow(False), True])
def test_no_races(masked):
    """In the interpreter that has a chip's memories, DMAs and semaphores."""
    query, key, value, cotangent = inputs(200, 300, heads=2, dim=64)
    own = jnp.asarray(np.arange(200)[None] // 70, jnp.int32)
    theirs = jnp.asarray(np.arange(300)[None] // 100, jnp.int32)
    ranges = segment_ranges(own, theirs) if masked else None
    options = {
        "generation": "v6e",
        "blocks": SMALL,
        "ranges": ranges,
        "interpret": pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized"),
    }
    results = tpu.forward(query, key, value, **options)
    assert not interpret_races()
    gradients = tpu.backward(query, key, value, *results, cotangent, **options)
    assert not interpret_races()
    seen = np.ones((1, 200, 300), bool) if ranges is None else np.asarray(ranges.visible())
    expected = exact(query, key, value, cotangent, seen)
    assert all(error(a, b) <= 2e-6 for a, b in zip((*results, *gradients), expected, strict=True))


def interpret_races() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.races.races_found)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ["all", "segments", "frames", "blocks"])
@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (96, 1), (128, 1), (192, 1), (256, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_the_block_sizes_that_are_shipped(generation, kind, dim, heads, dtype):
    """With more than one block each way, and a last one that is not full."""
    padded = dim if dim == 64 else -(-dim // 128) * 128
    bits = jnp.finfo(dtype).bits
    masked = kind in ("segments", "frames")
    sizes = [
        specs.block_sizes(generation, which, head_dim=padded, bits=bits, masked=masked)
        for which in ("forward", "backward")
    ]
    queries, keys = (
        max(sizes, key=lambda size: getattr(size, name)).__getattribute__(name) + 200
        for name in ("queries", "keys")
    )
    arrays = inputs(queries, keys, heads=heads, dim=dim, dtype=dtype)
    options = {}
    if kind == "segments":
        own, theirs = (jnp.arange(n)[None] * 3 // n for n in (queries, keys))
        options["ranges"] = segment_ranges(own, theirs)
    if kind == "frames":
        own, theirs = (jnp.arange(n)[None] * 7 // n for n in (queries, keys))
        options["ranges"] = causal_ranges(own, theirs)
    if kind == "blocks":
        size = sizes[0].queries
        blocks = jnp.eye(-(-queries // size), -(-keys // size), dtype=bool)
        options["block_mask"] = BlockMask(blocks=blocks, query_size=size, key_size=size)
    mask = np.ones((1, queries, keys), bool)
    if "ranges" in options:
        mask &= np.asarray(options["ranges"].visible())
    if "block_mask" in options:
        mask &= np.asarray(options["block_mask"].visible(queries, keys))[None]
    kernel = {"generation": generation, "interpret": True, **options}
    forward = jax.jit(functools.partial(tpu.forward, **kernel))
    backward = jax.jit(functools.partial(tpu.backward, **kernel))
    results = forward(*arrays[:3])
    gradients = backward(*arrays[:3], *results, arrays[3])
    expected = exact(*arrays, mask)
    tolerance = 4e-3 if dtype == "bfloat16" else 2e-6
    errors = [
        error(a, b) for a, b in zip((results[0], *gradients), (expected[0], *expected[2:]), strict=True)
    ]
    assert max(errors) <= tolerance, errors
