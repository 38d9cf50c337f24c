from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vidgen.nn.layers import Linear
from vidgen.nn.stack import Remat, apply_stack, make_stack
from vidgen.preflight.flops import matmul_flops


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


@pytest.mark.parametrize("remat", get_args(Remat))
def test_layers_are_applied_in_order(stack, remat):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    scale = jnp.asarray(1.5)
    apply = lambda layer, x, _, scale: (jnp.sin(layer(x)) * scale, None)  # noqa: E731
    y, none = jax.jit(lambda stack, x: apply_stack(stack, x, apply, remat=remat, scale=scale))(stack, x)
    assert none is None
    expected = np.asarray(x, np.float64)
    for kernel in np.asarray(stack.kernel[...], np.float64):
        expected = 1.5 * np.sin(expected @ kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_each_layer_gets_its_own_value_and_returns_a_new_one(stack):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    caches = {"sum": jnp.arange(4.0)[:, None, None] + jnp.zeros((4, 2, 3)), "length": jnp.arange(4)}

    def apply(layer, x, cache):
        return layer(x), {"sum": cache["sum"] + x, "length": cache["length"] + 1}

    y, found = jax.jit(lambda stack, x, c: apply_stack(stack, x, apply, per_layer=c, remat="full"))(
        stack, x, caches
    )
    np.testing.assert_array_equal(found["length"], np.arange(4) + 1)
    for index in range(4):
        np.testing.assert_allclose(found["sum"][index], index + x, rtol=1e-5, atol=1e-6)
        x = jax.tree.map(lambda leaf: leaf[index], stack)(x)  # noqa: B023
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", get_args(Remat))
def test_gradients_do_not_depend_on_what_is_saved(stack, remat):
    """What lies in the host's memory in between is each layer's input, with `offload` alone."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)

    def loss(stack, x, remat):
        apply = lambda layer, x, _: (layer(checkpoint_name(layer(x), "attention")), None)  # noqa: E731
        return jnp.square(apply_stack(stack, x, apply, remat=remat)[0]).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    found, expected = gradient(stack, x, remat), gradient(stack, x, "none")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    traced = gradient.trace(stack, x, remat)
    program = str(traced.jaxpr)
    assert ("f32<host>[4,2,3] = scan" in program) == ("<host>" in program) == (remat == "offload")
    # Of four layers two products forward, four backward, and one again for the gradient of the second.
    product = 2 * 2 * 3 * 3
    assert matmul_flops(traced.jaxpr) == 4 * (7 if remat in ("full", "offload") else 6) * product
