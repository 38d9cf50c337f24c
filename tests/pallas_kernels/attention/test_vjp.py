"""The differentiable function, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vidgen.pallas_kernels.attention import reference
from vidgen.pallas_kernels.attention.masks import BlockMask, causal_ranges
from vidgen.pallas_kernels.attention.vjp import attention

TPU = {"backend": "tpu", "generation": "v6e", "interpret": True}
GPU = {"backend": "gpu", "interpret": True}


def inputs(length=256, heads=2, dim=64):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((1, length, heads, dim)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("options", [TPU, GPU], ids=["tpu", "gpu"])
def test_gradients_are_those_of_the_function(options):
    times = jnp.arange(256)[None] // 60
    blocks = jnp.asarray([[True, False], [True, True]])
    masks = {
        "ranges": causal_ranges(times, times),
        "block_mask": BlockMask(blocks=blocks, query_size=128, key_size=128),
    }
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((1, 256, 2, 64)), jnp.float32)

    def loss(function):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: (function(q, k, v) * weights).sum(), argnums=(0, 1, 2))
        )

    found = loss(lambda q, k, v: attention(q, k, v, **masks, **options))(*inputs())
    expected = loss(lambda q, k, v: reference.forward(q, k, v, **masks)[0])(*inputs())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def test_check_grads():
    call = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.5, **TPU))
    check_grads(call, inputs(length=128, heads=1), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_a_device_without_kernels_says_so():
    with pytest.raises(NotImplementedError, match="no kernel for cpu"):
        attention(*inputs(length=8))
