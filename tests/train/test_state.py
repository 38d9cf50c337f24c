import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.train import toy
from vidgen.core.tree import named_leaves
from vidgen.nn.variables import Buffer
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import AdamW, Muon
from vidgen.train.state import FrozenState, abstract_state, ema_model, init_state, place_frozen


@pytest.fixture(scope="module")
def mesh():
    return MeshOptions(data=2, fsdp=2, tensor=2).build()


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_moments_and_averages_are_born_sharded_as_their_parameters(mesh, optimizer):
    state, _ = init_state(toy.ToyTask(), optimizer.transformation(10), jax.random.key(0), mesh)
    params = {name: leaf.sharding.spec for name, leaf in named_leaves(state.params).items()}
    assert params["up"] == P("fsdp", "tensor") and params["bias"] == P("tensor")
    assert {name: leaf.sharding.spec for name, leaf in named_leaves(state.ema).items()} == params
    moments = {
        name: leaf for name, leaf in named_leaves(state.opt_state).items() if name.split(".")[-1] in params
    }
    assert len(moments) >= (2 * len(params) if optimizer.kind == "adamw" else len(params))
    for name, leaf in moments.items():
        assert leaf.sharding.spec == params[name.split(".")[-1]], name
        assert leaf.dtype == jnp.float32


def test_numbers_do_not_depend_on_the_mesh(mesh):
    tx = AdamW().transformation(10)
    sharded, graphdef = init_state(toy.ToyTask(), tx, jax.random.key(3), mesh)
    single, other = init_state(toy.ToyTask(), tx, jax.random.key(3), MeshOptions().build(jax.devices()[:1]))
    assert graphdef == other
    for name, leaf in named_leaves(sharded.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(single.params)[name])
    assert np.std(sharded.params["up"][...]) > 0.1
    another, _ = init_state(toy.ToyTask(), tx, jax.random.key(4), mesh)
    assert not np.array_equal(another.params["up"][...], sharded.params["up"][...])


def test_abstract_state_is_the_shape_of_the_state(mesh):
    tx = AdamW().transformation(10)
    abstract, graphdef = abstract_state(toy.ToyTask(), tx, mesh)
    state, other = init_state(toy.ToyTask(), tx, jax.random.key(0), mesh)
    assert graphdef == other and jax.tree.structure(abstract) == jax.tree.structure(state)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), abstract, state
    )
    assert all(jax.tree.leaves(same))


def test_ema_model_has_averaged_weights_and_is_a_copy(mesh):
    state, graphdef = init_state(toy.ToyTask(), AdamW().transformation(10), jax.random.key(0), mesh)
    model = ema_model(state, graphdef, nnx.State({}))
    np.testing.assert_array_equal(model.up[...], state.ema["up"][...])
    model.seen[...] = model.seen[...] + 5
    assert float(state.buffers["seen"][...]) == 0


def test_parameters_of_other_types_are_an_error(mesh):
    class Half(toy.ToyTask):
        def build(self, rngs):
            return nnx.Dict(up=nnx.Param(jnp.zeros(2, jnp.bfloat16)), seen=Buffer(jnp.zeros(())))

    with pytest.raises(TypeError, match="parameter up is bfloat16"):
        abstract_state(Half(), AdamW().transformation(1), mesh)


def test_frozen_modules_are_laid_over_the_mesh(mesh):
    assert place_frozen({}, mesh) == ({}, {})
    net = toy.Net(nnx.Rngs(0))
    graphdefs, states = place_frozen({"net": net}, mesh)
    assert states["net"]["up"][...].sharding.spec == P("fsdp", "tensor")
    merged = FrozenState(modules=states).merge(graphdefs)
    np.testing.assert_array_equal(merged["net"].up[...], net.up[...])
