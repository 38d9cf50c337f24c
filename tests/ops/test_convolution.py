import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.ops.convolution import conv3d
from vidgen.parallel.mesh import MeshOptions

CASES = {
    "plain": ((3, 3, 3), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "causal": ((3, 3, 3), (1, 1, 1), ((2, 0), (1, 1), (1, 1))),
    "time stride": ((3, 1, 1), (2, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "space stride, uneven padding": ((1, 3, 3), (1, 2, 2), ((0, 0), (0, 1), (0, 1))),
    "all at once": ((2, 3, 2), (3, 2, 1), ((1, 2), (0, 2), (1, 0))),
}


def native(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest"
    )


LARGE = ((3, 3, 3), (1, 1, 1), ((2, 0), (1, 1), (1, 1)))
"""Of a size for which CPUs have a formulation of their own."""


@pytest.fixture(scope="module", params=[*CASES.values(), LARGE], ids=[*CASES.keys(), "large"])
def case(request):
    size, strides, padding = request.param
    shape = (2, 2, 45, 96, 32) if request.param is LARGE else (2, 7, 6, 5, 3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*size, shape[-1], 4)).astype(np.float32)
    if request.param is LARGE:
        kernel /= 16  # Outputs are no larger than those of the other cases.
    return x, kernel, strides, padding


def test_result_and_gradients_are_those_of_a_3d_convolution(case):
    x, kernel, strides, padding = case
    weight = np.random.default_rng(1).normal(size=native(x, kernel, strides, padding).shape)
    weight = weight.astype(np.float32)

    def with_gradients(convolve):
        def loss(x, kernel):
            y = convolve(x, kernel)
            return (y * weight).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    (dx, dk), y = with_gradients(lambda x, k: conv3d(x, k, strides=strides, padding=padding))
    (dx_native, dk_native), y_native = with_gradients(lambda x, k: native(x, k, strides, padding))
    assert y.shape == y_native.shape
    np.testing.assert_allclose(y, y_native, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dx_native, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dk, dk_native, rtol=1e-5, atol=1e-4)


def test_the_result_has_the_dtype_of_the_input():
    x, kernel = jnp.ones((1, 1, 3, 3, 2), jnp.bfloat16), jnp.ones((1, 3, 3, 2, 2))
    assert conv3d(x, kernel).dtype == jnp.bfloat16


def test_it_is_a_cross_correlation_over_time():
    x = jnp.asarray([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1, 1)
    kernel = jnp.asarray([1.0, 2.0]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_array_equal(conv3d(x, kernel).reshape(-1), [1 + 20, 10 + 200])


CUT = {
    "causal": ((3, 3, 3), (1, 1, 1), ((2, 0), (1, 1), (1, 1))),
    "stride, uneven padding": ((1, 3, 3), (1, 2, 2), ((0, 0), (0, 1), (0, 1))),
    "stride, even kernel": ((3, 4, 4), (2, 2, 2), ((1, 1), (1, 1), (1, 1))),
    "points": ((1, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "no padding: not cut": ((1, 3, 3), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
}


@pytest.mark.parametrize("mesh", [MeshOptions(tensor=2, context=4), MeshOptions(tensor=2, context=2)])
@pytest.mark.parametrize("case", CUT.values(), ids=CUT.keys())
def test_cut_over_devices_it_is_that_of_one(case, mesh):
    size, strides, padding = case
    rng = np.random.default_rng(0)
    # One clip: the axis `data` is left over, and what lies on it are copies.
    x = rng.normal(size=(1, 5, 8, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(*size, 3, 4)).astype(np.float32)

    def with_gradients(x, kernel):
        def loss(x, kernel):
            y = conv3d(x, kernel, strides=strides, padding=padding)
            return jnp.sin(y).sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    (dx, dk), y = jax.jit(with_gradients)(x, kernel)
    mesh = mesh.build()
    with jax.set_mesh(mesh):
        (dx_cut, dk_cut), y_cut = jax.jit(with_gradients)(x, kernel)
    if padding[1] != (0, 0) or size == (1, 1, 1):
        rows, columns = y.shape[2] // mesh.shape["tensor"], y.shape[3] // mesh.shape["context"]
        assert y_cut.sharding.shard_shape(y.shape)[2:4] == (rows, columns)
    np.testing.assert_allclose(y_cut, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx_cut, dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dk_cut, dk, rtol=1e-5, atol=1e-4)
