import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from vidgen.core.config import ConfigError, resolve
from vidgen.diffusion.shift import GeometricShift, RootShift
from vidgen.diffusion.timesteps import AnyDensity, LogitNormal, Mode, TimestepDensity, Uniform

COUNT = 20_000
ROOT = RootShift(base_tokens=100, base_shift=2.0)
DENSITIES = [
    Uniform(),
    Uniform(shift=3.0),
    LogitNormal(),
    LogitNormal(mean=-0.5, std=1.6),
    LogitNormal(mean=0.4, std=0.7, shift=5.0),
    Mode(),
    Mode(scale=-1.0),
    Mode(scale=0.8, shift=3.0),
    Mode(scale=2 / (np.pi - 2)),
    LogitNormal(shift=ROOT),
]


def largest_distance(count):
    """Of an empirical distribution function from its own, but once in 10,000 times.

    Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant.
    """
    return np.sqrt(np.log(2 / 1e-4) / (2 * count))


def cdf(density, t, shift):
    """The analytic distribution function, the shift undone before."""
    t = t / (shift - (shift - 1) * t)
    if isinstance(density, Uniform):
        return t
    if isinstance(density, LogitNormal):
        return stats.norm.cdf(special.logit(t), density.mean, density.std)
    # Its decreasing map of uniform levels to timesteps, as in the paper, turned around by interpolation.
    u = np.linspace(0, 1, 200_001)
    mapped = 1 - u - density.scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return 1 - np.interp(t, mapped[::-1], u[::-1])


def distance(t, density, shift):
    return stats.kstest(np.asarray(t, np.float64), lambda t: cdf(density, t, shift)).statistic


def shift_of(density, num_tokens):
    return 2.0 * np.sqrt(num_tokens / 100) if density.shift is ROOT else density.shift


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_distribution(density):
    assert isinstance(density, TimestepDensity)
    for num_tokens in (100, 900):
        t = density.sample(jax.random.key(num_tokens), COUNT, num_tokens)
        assert t.shape == (COUNT,) and t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1
        shift = shift_of(density, num_tokens)
        assert distance(t, density, shift) < largest_distance(COUNT)
        # The bound is one that others exceed.
        assert distance(t, density, 1.2 * shift) > largest_distance(COUNT)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_quantiles_invert_the_distribution(density):
    # But for the middle, where the steepest mode density is infinite.
    level = jnp.concatenate([jnp.linspace(0.01, 0.45, 45), jnp.linspace(0.55, 0.99, 45)])
    t = np.asarray(density.quantile(level, 400), np.float64)
    np.testing.assert_allclose(cdf(density, t, shift_of(density, 400)), level, atol=1e-5, rtol=0)


def test_every_clip_of_a_row_has_the_density_of_its_own_size():
    density = LogitNormal(mean=0.2, shift=ROOT)
    num_tokens = jnp.tile(jnp.asarray([100, 1600]), COUNT)
    t = density.sample(jax.random.key(0), 2 * COUNT, num_tokens)
    for part, shift in ((t[::2], 2.0), (t[1::2], 8.0)):
        assert distance(part, density, shift) < largest_distance(COUNT)


@pytest.mark.parametrize("density", [Uniform(stratified=True), LogitNormal(shift=3.0, stratified=True)])
def test_stratified_batches(density):
    """Each timestep has the density, and those of a batch are spread as evenly as can be."""
    keys = jax.random.split(jax.random.key(0), COUNT)
    batches = jax.vmap(lambda key: density.sample(key, 8, 1))(keys)
    for place in (0, 5):
        assert distance(batches[:, place], density, density.shift) < largest_distance(COUNT)
    levels = np.sort(cdf(density, np.asarray(batches[:100], np.float64), density.shift), axis=1)
    np.testing.assert_allclose(np.diff(levels, axis=1), 1 / 8, atol=1e-5)


def test_another_key_gives_other_timesteps():
    samples = [LogitNormal().sample(jax.random.key(seed), 4, 1) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert not np.isclose(samples[0], samples[2]).any()


def test_densities_in_configs():
    chosen = resolve(AnyDensity, {"kind": "mode", "shift": {"kind": "geometric", "max_shift": 4}})
    assert chosen == Mode(shift=GeometricShift(max_shift=4.0))
    assert resolve(AnyDensity, {"kind": "uniform", "shift": 3}) == Uniform(shift=3.0)
    with pytest.raises(ConfigError, match=r"scale=2\.0: .* in \[-1, 1\.7519\]"):
        resolve(AnyDensity, {"kind": "mode", "scale": 2.0})
    with pytest.raises(ConfigError, match=r"shift=0\.0 must be positive"):
        resolve(AnyDensity, {"kind": "logit_normal", "shift": 0})
