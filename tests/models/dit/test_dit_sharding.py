"""The transformer over a mesh: loss and gradients are those of one device, whatever is cut how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.nn.embeddings import grid_positions
from vidgen.ops.sequence_parallel import SequenceParallel
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import batch_sharding, constrain_tree, shardings

# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = DiTConfig(
    in_channels=4, model_dim=48, num_layers=2, num_heads=8, ffn_dim=64, text_dim=10, freq_dim=8, remat="full"
)
ROWS, TOKENS, TEXT, PATCH = 4, 32, 6, 16


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def batch():
    """Rows of two clips, of 20 and 12 tokens, each with a prompt of its own."""
    rng = np.random.default_rng(1)
    positions = np.concatenate([grid_positions(1, 4, 5), grid_positions(3, 2, 2)])
    arrays = {
        "patches": rng.normal(size=(ROWS, TOKENS, PATCH)),
        "timestep": rng.uniform(size=(ROWS, TOKENS)),
        "text": rng.normal(size=(ROWS, TEXT, 10)),
        "target": rng.normal(size=(ROWS, TOKENS, PATCH)),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()} | {
        "positions": jnp.tile(positions, (ROWS, 1, 1)),
        "tokens_of": jnp.tile(jnp.repeat(jnp.arange(2), np.asarray([20, 12])), (ROWS, 1)),
        "text_of": jnp.tile(jnp.repeat(jnp.arange(2), np.asarray([4, 2])), (ROWS, 1)),
    }


def make_step(graphdef):
    """Loss and gradients as in `vidgen.train.step`."""

    def loss(params, batch):
        velocity = nnx.merge(graphdef, params).tokens(
            batch["patches"],
            batch["timestep"],
            batch["text"],
            positions=batch["positions"],
            segment_ids=(batch["tokens_of"], batch["text_of"]),
        )
        return jnp.square(velocity - batch["target"]).mean()

    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        return value, constrain_tree(grads)

    return step


@pytest.fixture(scope="module")
def expected(model, batch):
    graphdef, params = nnx.split(model, graph=False)
    return jit(make_step(graphdef))(params, batch)


def over(mesh, model, batch, sequence):
    """The step compiled for the mesh, and its arguments laid over it."""
    config = dataclasses.replace(CONFIG, sequence=sequence)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), graph=False)
    params = nnx.state(model, graph=False)
    params = jax.device_put(params, shardings(params, mesh))
    batch = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jit(make_step(graphdef)).lower(params, batch).compile(), (params, batch)


@pytest.mark.parametrize(
    ("mesh", "sequence"),
    [
        (MeshOptions(data=1, context=8), SequenceParallel(method="ring")),
        (MeshOptions(data=1, context=8), SequenceParallel(method="gather")),
        (MeshOptions(data=1, context=8), SequenceParallel(method="ulysses")),
        (MeshOptions(data=1, context=4, tensor=2), SequenceParallel()),
        (MeshOptions(data=1, context=4, tensor=2), SequenceParallel(method="ulysses", ulysses=2)),
        (MeshOptions(data=1, fsdp=2, context=2, tensor=2), SequenceParallel()),
        (MeshOptions(data=1, fsdp=2, context=2, tensor=2), SequenceParallel(method="ring")),
        (MeshOptions(data=1, fsdp=4, tensor=2), SequenceParallel()),
    ],
    ids=lambda value: " ".join(
        f"{field.name}={getattr(value, field.name)}" for field in dataclasses.fields(value)
    ),
)
def test_loss_and_gradients_are_those_of_one_device(model, batch, expected, mesh, sequence):
    compiled, arguments = over(mesh.build(), model, batch, sequence)
    loss, grads = compiled(*arguments)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    ours, theirs = named_leaves(grads), named_leaves(expected[1])
    for name, gradient in theirs.items():
        largest = float(np.abs(gradient).max())
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-5, atol=1e-5 * largest, err_msg=name)
