import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from vidgen.core import tree


@pytest.fixture
def linear():
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def test_names_of_a_module_and_of_its_state(linear):
    assert list(tree.named_leaves(linear)) == ["bias", "kernel"]
    named = tree.named_leaves(nnx.state(linear))
    assert list(named) == ["bias", "kernel"]
    assert named["kernel"].shape == (2, 3)


def test_names_go_through_every_kind_of_node():
    leaves = tree.named_leaves({"a": [1, (2, 3)], "value": 4})
    assert leaves == {"a.0": 1, "a.1.0": 2, "a.1.1": 3, "value": 4}


def test_names_of_optimizer_moments(linear):
    names = tree.named_leaves(optax.adam(1e-3).init(nnx.state(linear)))
    assert {"0.count", "0.mu.kernel", "0.nu.bias"} <= set(names)


def test_count_and_bytes_of_arrays_and_of_shapes(linear):
    assert tree.count(linear) == 9
    assert tree.num_bytes(linear) == 36
    shapes = jax.eval_shape(lambda: {"x": jnp.zeros((4, 5), jnp.bfloat16), "key": jax.random.key(0)})
    assert tree.count(shapes) == 21
    assert tree.num_bytes(shapes) == 40 + 8
