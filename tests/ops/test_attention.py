import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.ops.array_shapes import array_shapes
from tests.pallas_kernels.attention.cases import error, exact
from vidgen.ops import score_budget
from vidgen.ops.attention import attention
from vidgen.ops.key_ranges import cross_attention_ranges, self_attention_ranges
from vidgen.ops.score_budget import ScoresTooLarge
from vidgen.parallel.mesh import MeshOptions


def reference(query, key, value, mask=None):
    """Softmax attention in float64, written out; `mask` is b, s, r."""
    query, key, value = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ value).transpose(0, 2, 1, 3)


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    shapes = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)
    return tuple(jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes)


KEY_MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1]], bool)
SEGMENTS = (
    np.array([[0, 0, 1, 1, 1], [2, 2, 0, 1, 1]], np.int32),
    np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 2, 2, 1, 0, 0]], np.int32),
)


@pytest.mark.parametrize(("masked", "packed"), [(False, False), (True, False), (False, True), (True, True)])
def test_against_float64(qkv, masked, packed):
    mask = np.ones((2, 5, 7), bool)
    if masked:
        mask = mask & KEY_MASK[:, None]
    if packed:
        mask = mask & (SEGMENTS[0][:, :, None] == SEGMENTS[1][:, None])
    assert mask.any(-1).all(), "each query must see a key"
    ranges = cross_attention_ranges(
        5,
        clip_ids=jax.tree.map(jnp.asarray, SEGMENTS) if packed else None,
        key_mask=jnp.asarray(KEY_MASK) if masked else None,
    )
    y = jax.jit(attention)(*qkv, ranges=ranges)
    np.testing.assert_allclose(y, reference(*qkv, mask), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "blocks", "pallas_tpu", "pallas_gpu"])
def test_a_token_sees_its_clips_chunks_up_to_its_own(implementation):
    rng = np.random.default_rng(6)
    arrays = tuple(jnp.asarray(rng.normal(size=(1, 45, 1, 64)), jnp.float32) for _ in range(4))
    clips = np.repeat([[1, 2, 0]], [17, 22, 6], axis=1)
    chunks = np.concatenate([np.arange(17) // 3, np.arange(22) // 5, np.zeros(6, int)])[None]
    ahead = chunks[:, :, None] - chunks[:, None]
    mask = (clips[:, :, None] == clips[:, None]) & (ahead >= 0) & (ahead <= 2)
    ranges = self_attention_ranges(jnp.asarray(clips), jnp.asarray(chunks), past_chunks=2)

    @jax.jit
    def both(query, key, value, cotangent, ranges):
        call = functools.partial(attention, ranges=ranges, implementation=implementation)
        y, back = jax.vjp(call, query, key, value)
        return y, *back(cotangent)

    expected, _, *gradients = exact(*arrays, mask)
    for one, wanted in zip(both(*arrays, ranges), (expected, *gradients), strict=True):
        assert error(one, wanted) <= 2e-6


def some_keys():
    return cross_attention_ranges(5, key_mask=jnp.asarray(KEY_MASK))


def test_masked_keys_and_values_have_no_influence_at_all(qkv):
    query, key, value = qkv
    call = jax.jit(lambda k, v: attention(query, k, v, ranges=some_keys()))
    hidden = ~KEY_MASK[:, :, None, None]
    changed = call(np.where(hidden, 1e6, key), np.where(hidden, -1e6, value))
    np.testing.assert_array_equal(changed, call(key, value))


def test_gradients_are_those_of_finite_differences(qkv):
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)

    def loss(*inputs):
        return (reference(*inputs, np.broadcast_to(KEY_MASK[:, None], (2, 5, 7))) * weight).sum()

    def loss_jax(query, key, value):
        return (attention(query, key, value, ranges=some_keys()) * weight.astype(np.float32)).sum()

    gradients = jax.jit(jax.grad(loss_jax, argnums=(0, 1, 2)))(*qkv)
    rng = np.random.default_rng(2)
    wide = [np.asarray(x, np.float64) for x in qkv]
    for _ in range(3):
        direction = [rng.normal(size=x.shape) for x in wide]
        ahead, behind = (
            loss(*(x + s * d for x, d in zip(wide, direction, strict=True))) for s in (1e-5, -1e-5)
        )
        inner = sum((g * d).sum() for g, d in zip(map(np.asarray, gradients), direction, strict=True))
        np.testing.assert_allclose(inner, (ahead - behind) / 2e-5, rtol=1e-4)


def test_scores_and_softmax_of_16_bit_inputs_are_float32():
    # The products 2048 and 2052 are one number in bfloat16; their scores differ by 4 / sqrt(4) = 2.
    query = jnp.full((1, 1, 1, 4), 32.0, jnp.bfloat16)
    key = jnp.asarray([[16.0, 16.0, 16.0, 16.0], [16.125, 16.0, 16.0, 16.0]], jnp.bfloat16).reshape(
        1, 2, 1, 4
    )
    value = jnp.asarray([[0.0] * 4, [1.0] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    y = attention(query, key, value)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 1 / (1 + np.exp(-2.0)), rtol=4e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_have_the_gradients_of_finite_differences(packed):
    """Interpreted; of what every model calls."""
    rng = np.random.default_rng(3)
    arrays = tuple(jnp.asarray(rng.normal(size=(1, n, 2, 64)), jnp.float32) for n in (40, 50, 50))
    ids = tuple(jnp.asarray(np.arange(n)[None] // 15, jnp.int32) for n in (40, 50)) if packed else None

    def call(*arrays):
        ranges = cross_attention_ranges(40, clip_ids=ids)
        return attention(*arrays, ranges=ranges, implementation="pallas_tpu")

    check_grads(jax.jit(call), arrays, order=1, modes=["rev"], rtol=2e-3, atol=2e-3, eps=1e-2)


def test_what_kernels_do_not_take_falls_to_the_next(qkv, monkeypatch):
    """On a TPU, heads that are too wide, and a bias, are for XLA."""
    monkeypatch.setattr("vidgen.ops.attention.device_kind", lambda: ("tpu", "TPU v5 lite"))
    monkeypatch.setattr("vidgen.ops.attention_kernels.device_kind", lambda: ("tpu", "TPU v5 lite"))
    wide = [jnp.tile(x, (1, 1, 1, 64)) for x in qkv]
    with pytest.raises(NotImplementedError, match="512"):
        attention(*wide, implementation="pallas_tpu")
    np.testing.assert_allclose(attention(*wide), attention(*wide, implementation="xla"))
    bias = jnp.zeros((1, 3, 5, 7))
    with pytest.raises(NotImplementedError, match="bias"):
        attention(*qkv, bias=bias, implementation="pallas_tpu")
    np.testing.assert_allclose(attention(*qkv, bias=bias), attention(*qkv, implementation="xla"), rtol=1e-6)


@pytest.fixture
def on_tpu(monkeypatch):
    score_budget._log_once.cache_clear()
    for module in ("attention", "attention_kernels"):
        monkeypatch.setattr(f"vidgen.ops.{module}.device_kind", lambda: ("tpu", "TPU v5 lite"))


def test_a_fallback_is_logged_once_for_each_shape_with_its_reasons(qkv, on_tpu, caplog):
    caplog.set_level("INFO")
    bias = jnp.zeros((1, 3, 5, 7))
    for _ in range(2):
        attention(*qkv, bias=bias)
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.message == (
        "attention of 2 x 5 queries to 7 keys, 3 heads of 8 channels, float32: xla, with 1 MiB of scores in "
        "the memory of a device, for pallas_tpu: pallas_tpu takes no bias of the scores; use `xla`"
    )
    attention(*(x[:1] for x in qkv), bias=bias)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(("channels", "chosen"), [(512, "blocks"), (24, "pallas_tpu")])
def test_a_long_sequence_that_kernels_do_not_take_is_attended_to_in_blocks(on_tpu, caplog, channels, chosen):
    tokens = jax.ShapeDtypeStruct((1, 60_013, 1, channels), jnp.bfloat16)
    loss = lambda x: attention(x, x, x).astype(jnp.float32).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss))(tokens)
    assert ("pallas_call" in str(program)) == (chosen == "pallas_tpu")
    assert max(np.prod(shape) for shape in array_shapes(program)) < 60_100 * 600
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (chosen == "blocks") and all("pallas_tpu: heads of 512" in text for text in warned)


def test_scores_beyond_the_budget_are_refused_with_the_reasons(monkeypatch, qkv, on_tpu):
    size = 4 * 2 * 3 * 5 * 7
    monkeypatch.setattr(score_budget, "SCORE_BYTES", size)
    wide = [jnp.tile(x, (1, 1, 1, 64)) for x in qkv]
    attention(*wide), attention(*wide, implementation="xla")
    monkeypatch.setattr(score_budget, "SCORE_BYTES", size - 1)
    with pytest.raises(ScoresTooLarge, match=r"xla would have .*SCORE_BYTES.* Use .*bfloat16.*context"):
        attention(*wide, implementation="xla")
    with pytest.raises(
        ScoresTooLarge, match=r"7 keys.*pallas_tpu: heads of 512.*xla would.*blocks would.*Use"
    ):
        attention(*wide)
    # Each of eight devices has the scores of its own clips, queries and heads.
    clips = [jnp.tile(x[:, :4], (2, 1, 1, 1)) for x in wide]
    with jax.set_mesh(MeshOptions(data=4, fsdp=1, context=2).build()):
        monkeypatch.setattr(score_budget, "SCORE_BYTES", 4 * 3 * 2 * 4)
        jax.eval_shape(lambda *x: attention(*x), *clips)
        monkeypatch.setattr(score_budget, "SCORE_BYTES", 4 * 3 * 2 * 4 - 1)
        with pytest.raises(ScoresTooLarge):
            jax.eval_shape(lambda *x: attention(*x), *clips)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_have_the_results_and_gradients_of_all_scores_at_once(monkeypatch, qkv, dtype):
    monkeypatch.setattr("vidgen.ops.attention_blocks._LARGEST", 3)

    def both(implementation, arrays):
        call = lambda *x: attention(*x, ranges=some_keys(), implementation=implementation)  # noqa: E731
        y, back = jax.vjp(call, *arrays)
        return y, *back(jnp.ones_like(y))

    arrays = tuple(x.astype(dtype) for x in qkv)
    found = jax.jit(both, static_argnums=0)("blocks", arrays)
    assert [x.dtype for x in found] == [jnp.dtype(dtype)] * 4
    expected = jax.jit(both, static_argnums=0)("xla", tuple(x.astype(jnp.float32) for x in arrays))
    for one, wanted in zip(found, expected, strict=True):
        assert error(one, wanted) <= (2e-6 if dtype == "float32" else 1e-2)
