import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.core.tree import named_leaves
from vidgen.nn import lora
from vidgen.nn.layers import Linear
from vidgen.nn.lora import LoRAOptions, adapted, add_low_rank, merge_low_rank
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.nn.variables import freeze


class Model(nnx.Module):
    """A stack of two linear maps between two others."""

    def __init__(self, rngs):
        self.first = Linear(6, 8, rngs=rngs)
        self.blocks = make_stack(lambda rngs: Linear(8, 8, axes=("embed", "heads"), rngs=rngs), 2, rngs)
        self.last = Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        apply = lambda layer, x, _: (jnp.tanh(layer(x)), None)  # noqa: E731
        return self.last(apply_stack(self.blocks, self.first(x), apply)[0])


OPTIONS = LoRAOptions(rank=3, alpha=6.0, targets="blocks|last")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)


def lowered(model):
    """The model with updates that are not zero."""
    add_low_rank(model, OPTIONS, rngs=nnx.Rngs(1))
    for index, linear in enumerate(adapted(model).values()):
        up = linear.low_rank.up
        up.set_value(jax.random.normal(jax.random.key(index), up.shape))
    return model


def test_an_update_begins_at_zero_and_has_the_layout_of_its_kernel():
    model = Model(nnx.Rngs(0))
    before = model(X)
    add_low_rank(model, OPTIONS, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(X), before)
    assert list(adapted(model)) == ["blocks", "last"]
    down, up = model.blocks.low_rank.down, model.blocks.low_rank.up
    assert (down.shape, up.shape) == ((2, 8, 3), (2, 3, 8))
    assert down.get_metadata("axes") == ("layers", "embed", "rank")
    assert up.get_metadata("axes") == ("layers", "rank", "heads")
    assert np.abs(down[...]).max() <= 8**-0.5 and down[...].std() > 0.1


def test_merged_weights_give_the_same():
    model = lowered(Model(nnx.Rngs(0)))
    plain = Model(nnx.Rngs(0))
    expected = model(X)
    assert np.abs(expected - plain(X)).max() > 0.1
    update = model.last.low_rank
    np.testing.assert_allclose(
        np.asarray(X[:, :4] @ jnp.ones((4, 8))) @ (2.0 * update.down[...] @ update.up[...]),
        np.asarray(update(X[:, :4] @ jnp.ones((4, 8)))),
        rtol=1e-5,
        atol=1e-5,
    )
    merge_low_rank(model)
    assert adapted(model) == {} and named_leaves(model).keys() == named_leaves(plain).keys()
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-5)


def test_only_updates_have_gradients_when_the_rest_is_frozen():
    model = freeze(Model(nnx.Rngs(0)))
    add_low_rank(model, OPTIONS, rngs=nnx.Rngs(1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ..., graph=False)
    assert sorted(named_leaves(params)) == [
        f"{name}.low_rank.{side}" for name in ("blocks", "last") for side in ("down", "up")
    ]
    gradients = jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params, rest)(X)).sum())(params)
    assert all((np.abs(g).max() > 0) == name.endswith("up") for name, g in named_leaves(gradients).items())


def test_targets_that_fit_nothing_and_impossible_ranks():
    with pytest.raises(ValueError, match=r"lora\.targets='query' fits no linear map; there are .*first"):
        add_low_rank(Model(nnx.Rngs(0)), LoRAOptions(targets="query"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lora\.rank is 0: it must be at least 1"):
        LoRAOptions(rank=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_merge_computes_one_layer_at_a_time(dtype):
    """What the programs of a merge take beside kernel and new kernel is a few layers, not all of them."""
    layers, width, rank = 64, 64, 4
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    kernel, one = array(layers, width, width), jax.ShapeDtypeStruct((width, width), jnp.float32)
    programs = (
        lora._matmul.lower(array(layers, width, rank), array(layers, rank, width), 3),
        lora._sum.lower(kernel, one, 2.0, 3),
        lora._with_layer.lower(kernel, array(width, width), 3),
    )
    for program in programs:
        memory = program.compile().memory_analysis()
        taken = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert taken <= 4 * 4 * width**2


def test_a_merge_is_exact_in_each_layer():
    model = lowered(Model(nnx.Rngs(0)))
    kernel, update = model.blocks.kernel[...], model.blocks.low_rank
    expected = np.asarray(kernel, np.float64) + update.scale * np.matmul(
        np.asarray(update.down[...], np.float64), np.asarray(update.up[...], np.float64)
    )
    merge_low_rank(model)
    np.testing.assert_allclose(model.blocks.kernel[...], expected, rtol=1e-6, atol=1e-6)
    assert not kernel.is_deleted()
