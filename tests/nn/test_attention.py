"""Multi-head attention by the kernels for TPUs, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.nn.attention import MultiHeadAttention
from vidgen.nn.embeddings import grid_positions, rope_angles
from vidgen.ops import norm_rope as module
from vidgen.parallel.mesh import MeshOptions

MESHES = {
    "alone": None,
    "clips and tokens": MeshOptions(data=2, context=4),
    "heads": MeshOptions(data=4, tensor=2),
}


def with_gradients(implementation, mesh=None):
    """A loss, and its gradients by parameters and input."""
    attention = MultiHeadAttention(128, 2, implementation=implementation, rngs=nnx.Rngs(0))
    attention.query_norm.scale[...] = jnp.linspace(0.5, 1.5, 128)
    x = jax.random.normal(jax.random.key(1), (4, 16, 128))
    angles = rope_angles(grid_positions(4, 2, 2)[None], 64)
    graph, state = nnx.split(attention)

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state)(x, angles=angles)).sum()

    if mesh is None:
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
    with jax.set_mesh(mesh.build()):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_kernels_give_what_plain_jax_does(mesh, monkeypatch):
    calls = []

    def counting(*arguments, **options):
        calls.append(options)
        return original(*arguments, **options)

    original = module.vjp.norm_rope
    monkeypatch.setattr(module.vjp, "norm_rope", counting)
    found = with_gradients("pallas_tpu", mesh)
    # Channels that are cut over devices are normalised without it.
    assert bool(calls) == (mesh is not MESHES["heads"])
    expected = with_gradients("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
