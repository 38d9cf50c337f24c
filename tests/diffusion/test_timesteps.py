import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from vidgen.diffusion.timesteps import LogitNormal, TimestepDensity, Uniform, shift_timestep

COUNT = 20_000


def quantile(density, q):
    """The analytic quantile function, unshifted."""
    if isinstance(density, Uniform):
        return q
    return special.expit(stats.norm.ppf(q, density.mean, density.std))


def unshift(t, shift):
    """Solved for the timestep from t' = shift t / (1 + (shift - 1) t)."""
    return t / (shift - (shift - 1) * t)


@pytest.mark.parametrize(
    "density",
    [
        Uniform(),
        Uniform(shift=3.0),
        LogitNormal(),
        LogitNormal(mean=-0.5, std=1.6),
        LogitNormal(mean=0.4, std=0.7, shift=5.0),
    ],
    ids=str,
)
def test_distribution(density):
    assert isinstance(density, TimestepDensity)
    t = np.asarray(density.sample(jax.random.key(0), COUNT))
    assert t.shape == (COUNT,) and t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1
    # Uniform again by the inverse of what made it: Kolmogorov and Smirnov's distance, of 1 in 10,000.
    levels = unshift(t.astype(np.float64), density.shift)
    if isinstance(density, LogitNormal):
        levels = stats.norm.cdf(special.logit(levels), density.mean, density.std)
    assert stats.kstest(levels, "uniform").pvalue > 1e-4
    for q in (0.1, 0.5, 0.9):
        expected = quantile(density, q)
        expected = density.shift * expected / (1 + (density.shift - 1) * expected)
        np.testing.assert_allclose(np.quantile(t, q), expected, atol=0.02)


def test_another_key_gives_other_timesteps():
    samples = [LogitNormal().sample(jax.random.key(seed), 4) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert not np.isclose(samples[0], samples[2]).any()


def test_shift_keeps_the_ends_and_moves_the_middle_to_noise():
    t = jnp.asarray([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_array_equal(shift_timestep(t, 1.0), t)
    np.testing.assert_allclose(shift_timestep(t, 3.0), [0.0, 0.5, 0.75, 1.0], rtol=1e-6)
    # The ratio of noise to signal grows by the factor `shift`.
    inner = np.asarray(shift_timestep(t, 7.0))[1:3]
    np.testing.assert_allclose(inner / (1 - inner), 7.0 * np.array([1 / 3, 1.0]), rtol=1e-5)
