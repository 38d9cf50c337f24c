import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.ops.convolution import conv3d, upsampled_conv3d
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


LARGE = {
    "large: 4, 2 and 1 frames": ((1, 7, 30, 40, 32), (3, 3, 3, 32, 33)),
    "large: 4 and 1 frames": ((2, 5, 30, 40, 33), (3, 3, 3, 33, 32)),
    "large: many channels, odd height": ((1, 3, 45, 64, 192), (3, 3, 3, 192, 193)),
    "large: 2D": ((1, 2, 65, 64, 192), (1, 3, 3, 192, 192)),
}
"""Of sizes for which CPUs have an algorithm of their own, with rounding errors some three times as large."""


@pytest.fixture(scope="module", params=[*CASES.values(), *LARGE.values()], ids=[*CASES.keys(), *LARGE.keys()])
def case(request):
    rng = np.random.default_rng(0)
    if request.param in LARGE.values():
        shape, size = request.param
        strides, padding = (1, 1, 1), ((size[0] - 1, 0), (1, 1), (1, 1))
    else:
        size, strides, padding = request.param
        shape, size = (2, 7, 6, 5, 3), (*size, 3, 4)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=size) / np.prod(size[:4]) ** 0.5  # Results have unit scale.
    atol = 3e-5 if request.param in LARGE.values() else 1e-5
    return x, kernel.astype(np.float32), strides, padding, atol


def test_result_and_gradients_are_those_of_a_3d_convolution(case):
    x, kernel, strides, padding, atol = case
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
    np.testing.assert_allclose(y, y_native, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(dx, dx_native, rtol=1e-5, atol=atol)
    scale = y[..., 0].size ** 0.5
    np.testing.assert_allclose(dk / scale, dk_native / scale, rtol=1e-5, atol=atol)


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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("mesh", [None, MeshOptions(tensor=2, context=4)])
def test_an_upsampled_convolution_is_that_of_repeated_pixels(mesh, platform, monkeypatch):
    if platform == "tpu":
        choose = lambda *arguments, cpu, default: default(*arguments)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 6, 8, 3)).astype(np.float32)
    kernel = (rng.normal(size=(1, 3, 3, 3, 4)) / 27**0.5).astype(np.float32)

    def with_gradients(convolve):
        def loss(x, kernel):
            y = convolve(x, kernel)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    def of_repeated(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return native(x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)))

    (dx_repeated, dk_repeated), y_repeated = with_gradients(of_repeated)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh.build()):
        (dx, dk), y = with_gradients(upsampled_conv3d)
    assert mesh is None or y.sharding.shard_shape(y.shape)[2:4] == (6, 4)
    np.testing.assert_allclose(y, y_repeated, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dx_repeated, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dk, dk_repeated, rtol=1e-5, atol=1e-4)
