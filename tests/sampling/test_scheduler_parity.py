"""Whole trajectories are those of diffusers' schedulers, timesteps that the network is told included."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.diffusion.shift import GeometricShift
from vidgen.sampling.sampler import sample
from vidgen.sampling.steppers import Euler, UniPC
from vidgen.sampling.time_grid import TimeGrid

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")


def schedulers(kind, shift):
    if kind == "unipc":
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return diffusers.UniPCMultistepScheduler(**options), UniPC()
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), Euler()


def velocity(x, t, sin):
    """Of no meaning, but neither linear nor the same at any two times."""
    return x + 0.3 * sin(3.0 * x + 5.0 * t) - 0.5 * sin(t)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("kind", ["unipc", "flow_match_euler"])
def test_trajectories(kind, num_steps, shift):
    scheduler, stepper = schedulers(kind, shift)
    noise = np.random.default_rng(0).normal(size=(2, 1, 2, 3, 4)).astype(np.float32)
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t / 1000.0, torch.sin), t, x).prev_sample

    def network(x, t):
        return velocity(x, t.reshape(-1, 1, 1, 1, 1), jnp.sin)

    grid = TimeGrid(num_steps=num_steps, shift=shift, convention=kind)
    # Thousandths in float32, as some of theirs are computed, are exact to some 1e-7.
    np.testing.assert_allclose(grid.timesteps(), scheduler.sigmas, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grid.model_timesteps()[:-1], scheduler.timesteps / 1000.0, rtol=0, atol=1e-6)
    found = sample(network, jnp.asarray(noise), grid=grid, stepper=stepper)
    assert np.abs(found - x.numpy()).max() <= 1e-5 * max(1.0, x.std().item())


@pytest.mark.parametrize("num_tokens", [256, 1024, 10_000])
def test_shifts_that_follow_the_size_as_for_flux(num_tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    grid = TimeGrid(num_steps=20, shift=GeometricShift()).for_tokens(num_tokens)
    np.testing.assert_allclose(grid.timesteps(), scheduler.sigmas, rtol=0, atol=1e-6)
