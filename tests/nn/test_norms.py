import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.nn.norms import ChannelNorm, LayerNorm, RMSNorm, layer_norm


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(3.0 + 2.0 * np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)


def set_random(variable, seed):
    variable[...] = jnp.asarray(np.random.default_rng(seed).normal(size=variable.shape), jnp.float32)
    return np.asarray(variable[...], np.float64)


def standardised(x, eps):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def test_layer_norm(x):
    np.testing.assert_allclose(layer_norm(x, eps=0.1), standardised(x, 0.1), rtol=1e-5, atol=1e-6)
    assert layer_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_layer_norm_with_weights(x):
    norm = LayerNorm(8, eps=0.1, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), standardised(x, 0.1), rtol=1e-5, atol=1e-6)
    scale, bias = set_random(norm.scale, 1), set_random(norm.bias, 2)
    np.testing.assert_allclose(norm(x), standardised(x, 0.1) * scale + bias, rtol=1e-5, atol=1e-5)


def test_rms_norm(x):
    norm = RMSNorm(8, eps=0.1, rngs=nnx.Rngs(0))
    scale = set_random(norm.scale, 1)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


def test_channel_norm(x):
    norm = ChannelNorm(8, rngs=nnx.Rngs(0))
    scale = set_random(norm.scale, 1)
    wide = np.asarray(x, np.float64)
    expected = wide / np.linalg.norm(wide, axis=-1, keepdims=True) * np.sqrt(8) * scale
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
    # Scale does not matter, down to nothing at all.
    np.testing.assert_allclose(norm(1e-4 * x), norm(x), rtol=1e-4)
    assert not np.asarray(norm(jnp.zeros_like(x))).any()


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, ChannelNorm])
def test_norms_compute_in_float32_and_return_the_dtype_of_the_input(kind, x):
    norm = kind(8, rngs=nnx.Rngs(0))
    y = norm(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = norm(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
