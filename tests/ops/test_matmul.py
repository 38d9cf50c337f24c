import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vidgen.ops.matmul import matmul
from vidgen.parallel.mesh import MeshOptions


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sum_of_sines(product):
    return jax.value_and_grad(lambda *args: jnp.sin(product(*args)).sum(), argnums=(0, 1))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 3)])
def test_product_and_gradients(batch):
    x, kernel = normal(*batch, 4), normal(4, 6, seed=1)
    np.testing.assert_allclose(matmul(x, kernel), x @ kernel, rtol=1e-6, atol=1e-6)
    found, expected = (jax.jit(sum_of_sines(f))(x, kernel) for f in (matmul, jnp.matmul))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("axes", [{"data": 4, "context": 2}, {"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_nothing_is_gathered_over_a_mesh(axes):
    mesh = MeshOptions(**axes).build()
    spec = PartitionSpec(("data", "fsdp"), "context")
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(8, 6, 4), spec)
        y = jax.jit(matmul).lower(x, normal(4, 6, seed=1)).compile()
        assert "all-gather" not in (y.as_text() or "all-gather")
        np.testing.assert_allclose(y(x, normal(4, 6, seed=1)), x @ normal(4, 6, seed=1), rtol=1e-6, atol=1e-6)
