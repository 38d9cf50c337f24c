import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.nn.layers import CausalConv3d, FeedForward, Linear, pixel_shuffle, pixel_unshuffle
from vidgen.nn.variables import param, zeros


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_linear():
    layer = Linear(3, 2, rngs=nnx.Rngs(0), axes=("embed", "heads"))
    layer.bias[...] = jnp.asarray([1.0, -1.0])
    x = normal(4, 5, 3)
    expected = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...]) + np.array([1.0, -1.0])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel.get_metadata("axes") == ("embed", "heads")
    assert layer.bias.get_metadata("axes") == ("heads",)
    assert Linear(3, 2, rngs=nnx.Rngs(0), use_bias=False).bias is None


def test_a_parameter_needs_a_name_for_each_axis():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 axis names, found \('embed',\)"):
        param(nnx.Rngs(0), zeros, (2, 3), ("embed",))


def test_causal_convolution_sees_the_past_and_its_surroundings():
    layer = CausalConv3d(1, 1, (3, 3, 3), rngs=nnx.Rngs(0))
    layer.kernel[...] = normal(3, 3, 3, 1, 1)
    layer.bias[...] = jnp.asarray([0.5])
    x = normal(1, 4, 3, 3, 1, seed=1)
    padded = np.pad(np.asarray(x)[0, ..., 0], ((2, 0), (1, 1), (1, 1)))
    kernel = np.asarray(layer.kernel[...])[..., 0, 0]
    expected = [
        [[(padded[t : t + 3, i : i + 3, j : j + 3] * kernel).sum() for j in range(3)] for i in range(3)]
        for t in range(4)
    ]
    np.testing.assert_allclose(layer(x)[0, ..., 0], np.asarray(expected) + 0.5, rtol=1e-4, atol=1e-5)


def test_a_causal_convolution_starts_with_the_present_frame_alone():
    layer = CausalConv3d(2, 4, (3, 3, 3), rngs=nnx.Rngs(0))
    x = normal(1, 4, 3, 3, 2)
    frames = [layer(x[:, [t]]) for t in range(4)]
    np.testing.assert_allclose(layer(x), np.concatenate(frames, axis=1), rtol=1e-5, atol=1e-6)
    assert np.asarray(layer.kernel[-1]).std() == pytest.approx((9 * 2) ** -0.5, rel=0.3)
    copying = CausalConv3d(2, 4, (3, 1, 1), identity=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(copying(x), np.tile(x, 2), rtol=1e-6)


def test_a_causal_convolution_of_few_frames_is_the_start_of_one_of_many():
    layer = random_module(lambda: CausalConv3d(2, 3, (3, 3, 3), rngs=nnx.Rngs(0)))
    x = normal(1, 4, 3, 3, 2)
    for frames in (1, 2, 3):
        np.testing.assert_allclose(layer(x[:, :frames]), layer(x)[:, :frames], rtol=1e-5, atol=1e-6)


def test_feed_forward_kinds():
    x = normal(1, 2, 4)
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    gates = {"gelu": None, "geglu": gelu, "swiglu": lambda x: x / (1 + np.exp(-x))}
    for kind, gate in gates.items():
        layer = FeedForward(4, 6, kind=kind, rngs=nnx.Rngs(0))
        wide = np.asarray(x, np.float64)
        hidden = wide @ np.asarray(layer.up.kernel[...])
        hidden = gelu(hidden) if gate is None else gate(wide @ np.asarray(layer.gate.kernel[...])) * hidden
        np.testing.assert_allclose(
            layer(x), hidden @ np.asarray(layer.down.kernel[...]), rtol=1e-4, atol=1e-5
        )
        assert (layer.gate is None) == (kind == "gelu")
        assert len(jax.tree.leaves(layer)) == (4 if kind == "gelu" else 6)


def test_pixels_into_channels_and_back():
    x = normal(2, 3, 4, 6, 2)
    y = pixel_unshuffle(x, 2)
    assert y.shape == (2, 3, 2, 3, 8)
    np.testing.assert_array_equal(pixel_shuffle(y, 2), x)
    # Channel slowest, then column, then row.
    expected = [x[0, 0, row, 2 + column, c] for c in (0, 1) for column in (0, 1) for row in (0, 1)]
    np.testing.assert_array_equal(y[0, 0, 0, 1], expected)
    np.testing.assert_array_equal(pixel_unshuffle(x, 1), x)
