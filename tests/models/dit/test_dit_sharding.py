"""The transformer over a mesh: loss and gradients are those of one device, whatever is cut how."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core.streams import TEXT, Stream
from vidgen.core.tokens import Tokens
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
ROWS, TOKENS, WORDS, PATCH = 4, 40, 6, 16
SHAPE = re.compile(r"\w\[([\d,]+)\]")
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-3))


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def batch():
    """Rows of two clips, of 24 and 16 tokens, each with a prompt of its own."""
    rng = np.random.default_rng(1)
    positions = np.concatenate([grid_positions(1, 4, 6), grid_positions(4, 2, 2)])
    arrays = {
        "patches": rng.normal(size=(ROWS, TOKENS, PATCH)),
        "timestep": rng.uniform(size=(ROWS, TOKENS)),
        "text": rng.normal(size=(ROWS, WORDS, 10)),
        "target": rng.normal(size=(ROWS, TOKENS, PATCH)),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()} | {
        "positions": jnp.tile(positions, (ROWS, 1, 1)),
        "tokens_of": jnp.tile(jnp.repeat(jnp.arange(1, 3), np.asarray([24, 16])), (ROWS, 1)),
        "text_of": jnp.tile(jnp.repeat(jnp.arange(1, 3), np.asarray([4, 2])), (ROWS, 1)),
    }


def make_step(graphdef):
    """Loss, gradients and the parameters after a step."""

    def loss(params, batch):
        time_ids = jnp.tile(jnp.arange(TOKENS), (ROWS, 1))
        tokens = Tokens(batch["patches"], batch["positions"], batch["tokens_of"], time_ids)
        streams = {TEXT: Stream(batch["text"], clip_ids=batch["text_of"])}
        velocity, _ = nnx.merge(graphdef, params)(tokens, batch["timestep"], streams)
        return jnp.square(velocity - batch["target"]).mean()

    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads = constrain_tree(grads)
        updates, _ = TX.update(grads, TX.init(params), params)
        return value, grads, constrain_tree(optax.apply_updates(params, updates))

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


MESHES = {
    "ring": (MeshOptions(data=1, context=8), SequenceParallel(method="ring")),
    "rings that exchange": (
        MeshOptions(data=1, context=4, tensor=2),
        SequenceParallel(method="ulysses", ulysses=2),
    ),
    "three axes": (MeshOptions(data=1, fsdp=2, context=2, tensor=2), SequenceParallel()),
    "no context": (MeshOptions(data=1, fsdp=4, tensor=2), SequenceParallel()),
}


@pytest.fixture(scope="module", params=MESHES.values(), ids=MESHES.keys())
def compiled(request, model, batch):
    options, sequence = request.param
    mesh = options.build()
    return (mesh, *over(mesh, model, batch, sequence))


def test_loss_gradients_and_step_are_those_of_one_device_and_lie_by_the_table(compiled, expected):
    mesh, program, arguments = compiled
    loss, *trees = program(*arguments)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for ours, theirs in zip(trees, expected[1:], strict=True):
        places = named_leaves(shardings(ours, mesh))
        ours = named_leaves(ours)
        for name, value in named_leaves(theirs).items():
            largest = float(np.abs(value).max())
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5 * largest, err_msg=name)
            assert ours[name].sharding.is_equivalent_to(places[name], value.ndim), name
    kernel = trees[0].blocks.self_attention.query.kernel.get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (
        2,
        48 // mesh.shape["fsdp"],
        48 // mesh.shape["tensor"],
    )


def test_a_layer_sums_activations_three_times_and_gathers_matrices_only(compiled):
    """What is summed over `tensor` (Megatron, arXiv 1909.08053): the results of attention to tokens, of that
    to text, and of the network; and the squares of queries and keys, whose norms run across heads."""
    mesh, program, _ = compiled
    sent = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter)\(.*op_name=\"[^\"]*?/jvp\(\)/while/body",
        program.as_text(),
    )
    shapes = {
        kind: [
            tuple(map(int, dims.split(","))) for text, k in sent if k == kind for dims in SHAPE.findall(text)
        ]
        for kind in ("all-gather", "all-reduce", "reduce-scatter")
    }
    rows, tokens = ROWS // mesh.shape["fsdp"], TOKENS // mesh.shape["context"]
    tensor = mesh.shape["tensor"] > 1
    assert shapes["reduce-scatter"] == []
    activations = [shape for shape in shapes["all-reduce"] if shape[-1] == 48]
    assert [math.prod(shape) for shape in activations] == (3 if tensor else 0) * [rows * tokens * 48]
    # Queries and keys of tokens, queries and keys of cross-attention.
    norms = 3 * [(rows, tokens)] + [(rows, WORDS)] if tensor else []
    others = [shape for shape in shapes["all-reduce"] if shape not in activations]
    assert sorted(others) == sorted(norms)
    assert all({TOKENS, tokens, rows * tokens}.isdisjoint(shape) for shape in shapes["all-gather"])
