"""Averages whose profiles are powers of time, on trajectories of a few numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

from vidgen.core.config import ConfigError, resolve
from vidgen.train.options import RunOptions
from vidgen.train.power_law import PowerLaw, averaging, exponent, solve_weights

STEPS = 2000


def trajectory():
    """Three parameters that settle, each at its own pace, with noise."""
    t = np.arange(1, STEPS + 1)[:, None]
    walk = np.random.default_rng(0).normal(size=(STEPS, 3)).cumsum(0) / np.sqrt(STEPS)
    return np.exp(-t / np.array([200.0, 800.0, 3000.0])) + 0.3 * walk


def tracked(path, options):
    """The averages after each step of a run whose parameters go along `path`."""
    tx = averaging(optax.sgd(1.0), options)
    params = {"w": jnp.zeros(path.shape[1])}

    def body(carry, point):
        params, state = carry
        updates, state = tx.update({"w": params["w"] - point}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), [average["w"] for average in state.averages]

    (params, state), averages = jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(path, jnp.float32))
    np.testing.assert_allclose(params["w"], path[-1], rtol=1e-5)
    assert int(state.count) == len(path)
    return [np.asarray(average, np.float64) for average in averages]


def test_exponents_of_the_paper():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.2, 0.28])
def test_the_width_is_the_deviation_of_the_profile(sigma_rel):
    g = exponent(sigma_rel)
    moment = lambda n: integrate.quad(lambda s: (g + 1) * s**g * s**n, 0, 1)[0]  # noqa: E731
    assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_what_is_tracked_is_the_integral():
    """With the parameters after update k for the time from k - 1 to k, exactly."""
    path, options = trajectory()[:300], PowerLaw(sigma_rels=(0.05, 0.25))
    for sigma_rel, average in zip(options.sigma_rels, tracked(path, options), strict=True):
        for count in (1, 2, 50, 300):
            edges = (np.arange(count + 1) / count) ** (exponent(sigma_rel) + 1)
            expected = np.diff(edges) @ path[:count]
            np.testing.assert_allclose(average[count - 1], expected, rtol=2e-5, atol=2e-6)


def test_an_average_that_there_is_is_made_of_itself():
    profiles = [(t, exponent(s)) for t in (100, 200, 300) for s in (0.05, 0.1)]
    np.testing.assert_allclose(solve_weights(profiles, profiles[3]), np.eye(6)[3], atol=1e-6)


@pytest.mark.parametrize(("sigma_rel", "largest"), [(0.07, 2e-3), (0.15, 2e-3), (0.03, 2e-2)])
def test_a_third_average_out_of_snapshots_of_two(sigma_rel, largest):
    """Against the one that was tracked; a narrower one than both is the hardest."""
    path = trajectory()
    short, long, third = tracked(path, PowerLaw(sigma_rels=(0.05, 0.1, sigma_rel)))
    times = range(100, STEPS + 1, 100)
    profiles = [(t, exponent(s)) for t in times for s in (0.05, 0.1)]
    snapshots = np.stack([average[t - 1] for t in times for average in (short, long)])
    found = solve_weights(profiles, (STEPS, exponent(sigma_rel))) @ snapshots
    error = np.linalg.norm(found - third[-1])
    assert error < largest * np.linalg.norm(third[-1])
    assert error < 0.2 * min(np.linalg.norm(x[-1] - third[-1]) for x in (short, long))


def test_options():
    found = resolve(RunOptions, {"power_law": {"sigma_rels": [0.1, 0.2], "every": 5}}).power_law
    assert found == PowerLaw(sigma_rels=(0.1, 0.2), every=5) and RunOptions().power_law is None
    assert [step for step in range(1, 13) if found.due(step, 12)] == [5, 10, 12]
    for wrong, message in (
        ({"sigma_rels": [0.1, 0.3]}, r"sigma_rel=0\.3: widths of averages are above 0 and below 0\.2887"),
        ({"sigma_rels": [0.1, 0.1]}, "give different widths"),
        ({"every": 0}, "every=0: it must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(RunOptions, {"power_law": wrong})
