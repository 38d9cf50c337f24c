import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.tokens import Tokens
from vidgen.diffusion.rectified_flow import interpolate, velocity_loss


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CLEAN, NOISE = normal(0, 3, 8, 2), normal(1, 3, 8, 2)
TOKENS = Tokens(CLEAN, np.zeros((1, 8, 3), np.int32))
TIMES = jnp.asarray([[0.1], [0.5], [0.9]])
KNOWN = jnp.arange(8)[None] < jnp.asarray([[3], [0], [8]])


def double(tokens, timestep):
    return 2.0 * tokens.patches


def squared_errors(t):
    """Of `double`, for each token."""
    t, clean, noise = (np.asarray(x, np.float64) for x in (t, CLEAN, NOISE))
    return ((2.0 * ((1 - t) * clean + t * noise) - (noise - clean)) ** 2).mean(-1)


def test_the_path_goes_straight_from_data_to_noise():
    x = interpolate(TOKENS, NOISE, jnp.asarray([[0.0], [0.25], [1.0]])).patches
    np.testing.assert_array_equal(x[0], CLEAN[0])
    np.testing.assert_allclose(x[1], 0.75 * np.asarray(CLEAN[1]) + 0.25 * np.asarray(NOISE[1]), rtol=1e-6)
    np.testing.assert_array_equal(x[2], NOISE[2])


def test_the_target_is_the_derivative_of_the_path():
    path = lambda t: interpolate(TOKENS, NOISE, t).patches  # noqa: E731
    _, derivative = jax.jvp(path, (TIMES,), (jnp.ones((3, 1)),))
    losses, _ = velocity_loss(lambda x, t: derivative, TOKENS, NOISE, TIMES)
    np.testing.assert_allclose(losses, 0.0, atol=1e-12)


def test_the_loss_is_the_mean_squared_error_of_each_clip():
    seen = []

    def network(tokens, timestep):
        seen.append((tokens.patches, timestep))
        return double(tokens, timestep)

    losses, present = velocity_loss(network, TOKENS, NOISE, TIMES)
    np.testing.assert_allclose(losses[:, 0], squared_errors(TIMES[..., None]).mean(1), rtol=1e-5)
    assert losses.shape == (3, 1) and present.all()
    np.testing.assert_array_equal(seen[0][0], interpolate(TOKENS, NOISE, TIMES).patches)
    np.testing.assert_array_equal(seen[0][1], TIMES)
    # A clip's loss is its own, whatever it is batched with.
    alone, _ = velocity_loss(double, TOKENS._replace(patches=CLEAN[1:2]), NOISE[1:2], TIMES[1:2])
    np.testing.assert_allclose(alone, losses[1:2], rtol=1e-6)


def test_known_tokens_are_clean_and_not_in_the_loss():
    tokens = TOKENS._replace(known_mask=KNOWN)
    noisy = interpolate(tokens, NOISE, TIMES).patches
    np.testing.assert_array_equal(noisy[KNOWN], CLEAN[KNOWN])
    np.testing.assert_array_equal(noisy[~KNOWN], interpolate(TOKENS, NOISE, TIMES).patches[~KNOWN])
    losses, present = velocity_loss(double, tokens, NOISE, TIMES)
    errors = squared_errors(TIMES[..., None])
    np.testing.assert_allclose(losses[:2, 0], [errors[0, 3:].mean(), errors[1].mean()], rtol=1e-5)
    assert present[:, 0].tolist() == [True, True, False] and losses[2] == 0, (
        "nothing of the last is predicted"
    )


def test_tokens_may_have_timesteps_of_their_own():
    """Their loss is that of the only clip."""
    ids = jnp.tile(jnp.arange(8) // 4, (3, 1))
    times = jnp.concatenate([TIMES, TIMES[::-1]], axis=1)
    losses, _ = velocity_loss(double, TOKENS._replace(time_ids=ids), NOISE, times)
    of_tokens = np.take_along_axis(np.asarray(times), np.asarray(ids), axis=1)
    np.testing.assert_allclose(losses[:, 0], squared_errors(of_tokens[..., None]).mean(1), rtol=1e-5)


def test_the_loss_of_a_16_bit_network_is_float32():
    losses, _ = velocity_loss(
        lambda tokens, t: tokens.patches.astype(jnp.bfloat16), TOKENS, NOISE, jnp.ones((3, 1))
    )
    assert losses.dtype == jnp.float32
