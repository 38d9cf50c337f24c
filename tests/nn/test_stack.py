import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.nn.layers import Linear
from vidgen.nn.stack import apply_stack, make_stack


@pytest.fixture(scope="module")
def stack():
    return make_stack(lambda rngs: Linear(3, 3, axes=("embed", "mlp"), rngs=rngs), 4, nnx.Rngs(0))


def test_a_stack_has_a_named_axis_of_layers_with_their_own_weights(stack):
    assert stack.kernel.shape == (4, 3, 3) and stack.bias.shape == (4, 3)
    assert stack.kernel.get_metadata("axes") == ("layers", "embed", "mlp")
    assert stack.bias.get_metadata("axes") == ("layers", "mlp")
    kernels = np.asarray(stack.kernel[...])
    for index in range(1, 4):
        assert np.abs(kernels[index] - kernels[0]).max() > 0.1


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_are_applied_in_order(stack, remat):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    scale = jnp.asarray(1.5)
    apply = lambda layer, x, scale: jnp.sin(layer(x)) * scale  # noqa: E731
    y = jax.jit(lambda stack, x: apply_stack(stack, x, apply, remat=remat, scale=scale))(stack, x)
    expected = np.asarray(x, np.float64)
    for kernel in np.asarray(stack.kernel[...], np.float64):
        expected = 1.5 * np.sin(expected @ kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
