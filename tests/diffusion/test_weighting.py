import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from vidgen.diffusion.shift import RootShift
from vidgen.diffusion.timesteps import LogitNormal, Mode, Uniform
from vidgen.diffusion.weighting import CosMap, LossWeighting, MinSNR, mean_weight

WEIGHTINGS = [CosMap(), MinSNR(), MinSNR(gamma=0.5)]


def weigh(weighting, density, t, num_tokens=1):
    return weighting.weight(t) / mean_weight(weighting, density, num_tokens)


def test_min_snr_caps_the_weight_of_the_clean_prediction():
    t = np.linspace(0.01, 0.99, 50)
    # (x_0 - prediction)^2 = t^2 (v - prediction)^2
    of_clean = np.minimum(((1 - t) / t) ** 2, 5.0)
    np.testing.assert_allclose(MinSNR().weight(jnp.asarray(t)), of_clean * t**2, rtol=1e-4)


def test_cosmap_is_a_density():
    """That of 1 - 1 / (tan(pi u / 2) + 1) for uniform u, whose distribution function is its inverse."""
    t = np.linspace(0.05, 0.95, 19)
    for end in t:
        found = integrate.quad(lambda t: float(CosMap().weight(jnp.asarray(t))), 0, end)[0]
        assert found == pytest.approx(2 / np.pi * np.arctan(1 / (1 - end) - 1), rel=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_the_mean_under_the_density_is_exact(weighting):
    assert isinstance(weighting, LossWeighting)

    def integrand(z):
        t = special.expit(0.3 + 0.8 * z)
        t = 3 * t / (1 + 2 * t)
        return float(weighting.weight(jnp.asarray(t))) * stats.norm.pdf(z)

    expected = integrate.quad(integrand, -8, 8)[0]
    density = LogitNormal(mean=0.3, std=0.8, shift=3.0)
    np.testing.assert_allclose(mean_weight(weighting, density, 7), expected, rtol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("density", [LogitNormal(), Uniform(shift=5.0), Mode(stratified=True)], ids=str)
def test_the_mean_over_batches_does_not_depend_on_their_size(weighting, density):
    """One by one, in tens, all at once: the same weights, finite, 1 on average."""
    t = density.sample(jax.random.key(0), 10_000, 1)
    weights = weigh(weighting, density, t)
    tens = jax.vmap(lambda t: weigh(weighting, density, t))(t.reshape(-1, 10))
    np.testing.assert_allclose(tens.reshape(-1), weights, rtol=1e-6)
    one = jax.vmap(lambda t: weigh(weighting, density, t[None])[0])(t)
    np.testing.assert_allclose(one, weights, rtol=1e-6)
    assert np.isfinite(weights).all()
    error = 5 * np.std(weights) / np.sqrt(len(t))
    assert abs(np.mean(weights) - 1.0) < error
    # Clips that happen to share their timestep keep its weight.
    np.testing.assert_allclose(
        weigh(weighting, density, jnp.full(4, t[3])), np.full(4, weights[3]), rtol=1e-6
    )


def test_every_clip_is_normalised_for_its_own_size():
    density, sizes = Uniform(shift=RootShift(base_tokens=10)), jnp.asarray([10, 40, 1000])
    found = mean_weight(MinSNR(), density, sizes)
    expected = [mean_weight(MinSNR(), density, int(n))[0] for n in sizes]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.ptp(expected) > 0.01


def test_weights_that_are_none():
    with pytest.raises(ValueError, match=r"gamma=0\.0 must be positive"):
        MinSNR(gamma=0.0)
