"""Integrators on data whose velocity field is known: a Gaussian, and a single point."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.steps import take_step
from vidgen.sampling.sampler import initial_noise, sample
from vidgen.sampling.steppers import DPMSolver, Euler, Heun, Stepper, UniPC
from vidgen.sampling.time_grid import TimeGrid

MEAN, DEVIATION = 0.7, 0.4
STEPPERS = (Euler(), Heun(), DPMSolver(), UniPC())


def gaussian_velocity(x, t, mean=MEAN, deviation=DEVIATION):
    """E[noise - data | x] where data is normal: by the regression of both on x = (1 - t) data + t noise."""
    t = t.reshape(-1, 1, 1, 1, 1)
    residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
    return t * residual - (mean + (1 - t) * deviation**2 * residual)


def noise(count=2):
    return initial_noise(jnp.arange(count, dtype=jnp.uint32), (1, 2, 2, 2))


@functools.partial(jax.jit, static_argnames=("grid", "stepper"))
def integrate(noise, grid, stepper):
    return sample(gaussian_velocity, noise, grid=grid, stepper=stepper)


def flow(noise, t):
    """The exact flow: the mean and deviation of the path at t take the place of those of the noise."""
    return (1 - t) * MEAN + np.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2) * noise


def error(stepper, grid, start=1.0, end=0.0):
    wide = np.asarray(noise(), np.float64)
    made = integrate(jnp.asarray(flow(wide, start), jnp.float32), grid, stepper)
    return np.abs(made - flow(wide, end)).max()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiddleGrid(TimeGrid):
    """Evenly from 0.9 to 0.1: without the ends, where the log of the signal-to-noise ratio is infinite."""

    def timesteps(self):
        return np.linspace(0.9, 0.1, self.num_steps + 1, dtype=np.float32)


@pytest.mark.parametrize(("stepper", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolver(), 2)], ids=str)
def test_order_of_convergence(stepper, order):
    errors = np.array([error(stepper, MiddleGrid(num_steps=n), 0.9, 0.1) for n in (20, 40, 80)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.2)


def test_correcting_a_second_order_step_gives_almost_third_order():
    """Its first and last steps are of second order, corrected."""
    errors = np.array([error(UniPC(), MiddleGrid(num_steps=n), 0.9, 0.1) for n in (20, 40, 80)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert orders.min() > 2.5 and orders.max() < 3.1, orders


@pytest.mark.parametrize(
    ("stepper", "steps", "lowest", "highest"),
    [(Euler(), 10, 0.9, 1.1), (Heun(), 20, 1.85, 2.1), (DPMSolver(), 80, 1.4, 2.0)],
    ids=str,
)
def test_order_of_convergence_from_noise_to_data(stepper, steps, lowest, highest):
    """The multistep solver's error is h^2 log(1 / h): its steps in log-SNR do not shrink near the ends."""
    errors = np.array([error(stepper, TimeGrid(num_steps=steps * n)) for n in (1, 2, 4)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert lowest < orders.min() and orders.max() < highest, orders


def test_second_order_is_more_accurate_than_first():
    euler, heun, dpm, _ = (error(stepper, TimeGrid(num_steps=20)) for stepper in STEPPERS)
    unipc = error(UniPC(), TimeGrid(num_steps=20, convention="unipc"))
    assert heun < euler / 5 and dpm < euler / 5 and unipc < dpm


@pytest.mark.parametrize("stepper", STEPPERS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_single_point_is_reached_exactly(stepper, num_steps):
    """The path to one point is straight: no integrator errs on it."""
    assert isinstance(stepper, Stepper)
    point = jnp.arange(8.0).reshape(1, 1, 2, 2, 2) - 3.0

    def velocity(x, t):
        # Where t is 0 (Heun's last evaluation) the velocity is that of noise 0.
        t = t.reshape(-1, 1, 1, 1, 1)
        return jnp.where(t > 0, (x - point) / jnp.maximum(t, 1e-3), 0.0)

    # Heun evaluates at 0 too, where the field of a point is not defined: it may take its own last slope.
    if isinstance(stepper, Heun):
        noises = noise()
        velocity = lambda x, t: noises - point  # noqa: E731
    latents = sample(velocity, noise(), grid=TimeGrid(num_steps=num_steps, shift=2.0), stepper=stepper)
    np.testing.assert_allclose(latents, np.broadcast_to(point, latents.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("stepper", "calls"), [(Euler(), 1), (Heun(), 2), (DPMSolver(), 1), (UniPC(), 1)], ids=str
)
def test_network_calls_per_step_and_their_timesteps(stepper, calls):
    seen = []

    def network(x, t):
        seen.append(np.asarray(t).tolist())
        return x

    take_step(stepper, network, noise(), stepper.init(noise()), 0.5, 0.25)
    assert seen == [[0.5, 0.5], [0.25, 0.25]][:calls]


@pytest.mark.parametrize(("stepper", "expected"), [(Euler(), 1 - 0.25), (Heun(), 1 - 0.25 + 0.25**2 / 2)])
def test_steps_of_an_exponential(stepper, expected):
    """dx/dt = x from t = 1: one step of Taylor's series, of the integrator's order."""
    x = jnp.ones((1, 1, 1, 1, 1))
    y, _ = take_step(stepper, lambda x, t: x, x, stepper.init(x), 1.0, 0.75)
    np.testing.assert_allclose(y.item(), expected, rtol=1e-6)


def test_dpm_solver_is_second_order_in_the_log_snr():
    """A clean prediction that is linear in lambda, after the first steps, is integrated exactly."""
    log_snr = lambda t: np.log((1 - t) / t)  # noqa: E731
    times = np.array([0.8, 0.7, 0.55])
    stepper, x = DPMSolver(), jnp.full((1, 1, 1, 1, 1), 0.3)
    clean = lambda t: 0.2 + 0.1 * jnp.log((1 - t) / t)  # noqa: E731
    network = lambda x, t: (x - clean(t[0])) / t[0]  # noqa: E731
    state = stepper.init(x)
    x, state = take_step(stepper, network, x, state, 0.8, 0.7)
    y, _ = take_step(stepper, network, x, state, 0.7, 0.55)
    # 2M takes the clean prediction at half of the step in lambda, extrapolated from the last two.
    middle = 0.2 + 0.1 * (log_snr(times[1]) + log_snr(times[2])) / 2
    expected = 0.55 / 0.7 * x.item() + (1 - 0.55 / 0.7) * middle
    np.testing.assert_allclose(y.item(), expected, rtol=1e-5)
    # And its first step holds the prediction.
    np.testing.assert_allclose(x.item(), 0.7 / 0.8 * 0.3 + (1 - 0.7 / 0.8) * clean(0.8), rtol=1e-5)


def test_sampling_is_deterministic_and_each_clip_is_its_own():
    grid, stepper = TimeGrid(num_steps=5), DPMSolver()
    run = jax.jit(lambda noise: sample(gaussian_velocity, noise, grid=grid, stepper=stepper))
    both = run(noise(2))
    np.testing.assert_array_equal(both, run(noise(2)))
    np.testing.assert_allclose(run(noise(1)), both[:1], rtol=1e-6)


def test_noise_is_that_of_the_seed_and_standard_normal():
    seeds = jnp.asarray([7, 3], jnp.uint32)
    pair = np.asarray(initial_noise(seeds, (2, 16, 16, 8)))
    np.testing.assert_array_equal(pair[1:], initial_noise(seeds[1:], (2, 16, 16, 8)))
    assert np.abs(pair[0] - pair[1]).mean() > 0.5
    # Five standard errors of 4096 numbers.
    assert np.abs(pair.mean((1, 2, 3, 4))).max() < 5 / 64
    assert np.abs(pair.var((1, 2, 3, 4)) - 1).max() < 5 * 2**0.5 / 64
