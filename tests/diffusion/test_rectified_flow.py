import jax
import jax.numpy as jnp
import numpy as np

from vidgen.diffusion.rectified_flow import interpolate, velocity_loss


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CLEAN, NOISE = normal(0, 3, 2, 2, 2, 1), normal(1, 3, 2, 2, 2, 1)


def test_the_path_goes_straight_from_data_to_noise():
    t = jnp.asarray([0.0, 0.25, 1.0])
    x = interpolate(CLEAN, NOISE, t)
    np.testing.assert_array_equal(x[0], CLEAN[0])
    np.testing.assert_allclose(x[1], 0.75 * np.asarray(CLEAN[1]) + 0.25 * np.asarray(NOISE[1]), rtol=1e-6)
    np.testing.assert_array_equal(x[2], NOISE[2])


def test_the_target_is_the_derivative_of_the_path():
    t = jnp.asarray([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: interpolate(CLEAN, NOISE, t), (t,), (jnp.ones(3),))
    loss = velocity_loss(lambda x, t: derivative, CLEAN, NOISE, t)
    np.testing.assert_allclose(loss, 0.0, atol=1e-12)


def test_the_loss_is_the_mean_squared_error_of_each_clip():
    t = jnp.asarray([0.1, 0.5, 0.9])
    seen = []

    def network(x, timestep):
        seen.append((x, timestep))
        return 2.0 * x

    loss = velocity_loss(network, CLEAN, NOISE, t)
    x = np.asarray(interpolate(CLEAN, NOISE, t), np.float64)
    expected = ((2.0 * x - (np.asarray(NOISE) - np.asarray(CLEAN))) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(seen[0][0], x, rtol=1e-5)
    np.testing.assert_array_equal(seen[0][1], t)
    # A clip's loss is its own, whatever it is batched with.
    alone = velocity_loss(lambda x, t: 2.0 * x, CLEAN[1:2], NOISE[1:2], t[1:2])
    np.testing.assert_allclose(alone, loss[1:2], rtol=1e-6)


def test_the_loss_of_a_16_bit_network_is_float32():
    loss = velocity_loss(lambda x, t: x.astype(jnp.bfloat16), CLEAN, NOISE, jnp.ones(3))
    assert loss.dtype == jnp.float32
