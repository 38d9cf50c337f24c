import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import RULES, all_gather_fsdp, constrain, partition_spec, shardings


@pytest.fixture(scope="module")
def mesh():
    return MeshOptions(data=1, fsdp=2, context=2, tensor=2).build()


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
        (("mlp", "embed"), (16, 8), P("tensor", "fsdp")),
        (("layers", "embed", "heads"), (3, 8, 4), P(None, "fsdp", "tensor")),
        (("embed", "heads", "head_dim"), (8, 4, 6), P("fsdp", "tensor", None)),
        (("vocab", "embed"), (10, 8), P("tensor", "fsdp")),
        ((None, None, None, "conv_in", "conv_out"), (3, 3, 3, 8, 4), P(None, None, None, "fsdp", None)),
        (("embed", "mlp"), (7, 16), P(None, "tensor")),  # fsdp does not divide 7.
        (("mlp", "heads"), (8, 8), P("tensor", None)),  # A mesh axis is used once.
        (("batch", "tokens", "embed"), (4, 6, 8), P("fsdp", "context", None)),
        (
            ("batch", "time", "height", "width", None),
            (2, 5, 4, 4, 3),
            P("fsdp", None, "tensor", "context", None),
        ),
    ],
)
def test_table(mesh, axes, shape, spec):
    assert partition_spec(axes, shape, mesh) == spec


def test_a_dimension_is_cut_by_all_its_axes_as_far_as_they_divide_it():
    mesh = MeshOptions(data=2, fsdp=4).build()
    assert partition_spec(("batch", None), (16, 3), mesh) == P(("data", "fsdp"), None)
    assert partition_spec(("batch", None), (2, 3), mesh) == P("data", None)
    assert partition_spec(("batch", None), (4, 3), mesh) == P("data", None)
    assert partition_spec(("batch", None), (3, 3), mesh) == P(None, None)


def test_every_name_has_a_rule_of_axes_that_exist(mesh):
    assert {axis for axes in RULES.values() for axis in axes} <= set(mesh.axis_names)


def test_wrong_names_are_errors(mesh):
    with pytest.raises(ValueError, match='unknown logical axis "embd"; did you mean "embed"'):
        partition_spec(("embd",), (8,), mesh)
    with pytest.raises(ValueError, match="one name each"):
        partition_spec(("embed",), (8, 8), mesh)


def test_trees_of_variables_and_plain_arrays(mesh):
    tree = {
        "stack": nnx.Param(jnp.zeros((3, 8, 16)), axes=("layers", "embed", "mlp")),
        "plain": nnx.Param(jnp.zeros((8, 8))),
        "scalar": nnx.Param(jnp.zeros(()), axes=("embed",)),
        "count": jnp.zeros(()),
    }
    found = shardings(jax.eval_shape(lambda: tree), mesh)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert found["stack"].get_value().spec == P(None, "fsdp", "tensor")
    assert found["plain"].get_value().spec == found["scalar"].get_value().spec == found["count"].spec == P()


def test_constrain_lays_activations_over_the_mesh_in_context(mesh):
    x = jnp.arange(4 * 6 * 8.0).reshape(4, 6, 8)
    body = jax.jit(lambda x: constrain(2 * x, "batch", "tokens", "embed"))
    assert len(body(x).sharding.device_set) == 1  # No mesh, no constraint.
    with jax.set_mesh(mesh):
        y = body(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("fsdp", "context", None)), 3)
    np.testing.assert_array_equal(y, 2 * x)


def test_a_matrix_is_gathered_where_it_is_used_and_its_gradient_lies_as_it_is_stored(mesh):
    x, weight = (jnp.asarray(np.random.default_rng(i).normal(size=(8, 16)), jnp.float32) for i in range(2))
    use = lambda x: all_gather_fsdp(x, "embed", "mlp")  # noqa: E731
    np.testing.assert_array_equal(use(x), x)  # No mesh.
    loss = lambda x: (jnp.sin(use(x)) * weight).sum()  # noqa: E731
    with jax.set_mesh(mesh):
        y, gradient = jax.jit(use)(x), jax.jit(jax.grad(loss))(x)
        _, tangent = jax.jit(jax.jvp, static_argnums=0)(use, (x,), (weight,))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, "tensor")), 2)
    assert gradient.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("fsdp", "tensor")), 2)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(gradient, np.cos(x) * weight, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(tangent, weight)
