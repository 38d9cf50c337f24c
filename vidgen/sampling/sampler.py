"""Noise to latents: a time grid and a stepper under one `lax.scan`."""

import jax
import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Latents, PyTree, UInt32
from vidgen.sampling.steppers import Stepper
from vidgen.sampling.time_grid import TimeGrid


def sample(network: VelocityNetwork, noise: Latents, *, grid: TimeGrid, stepper: Stepper) -> Latents:
    """Integrates from noise at t = 1 to clean latents at t = 0."""
    timesteps = jnp.asarray(grid.timesteps())

    def body(
        carry: tuple[Latents, PyTree], times: tuple[Array, Array]
    ) -> tuple[tuple[Latents, PyTree], None]:
        latents, memory = carry
        return stepper.step(network, latents, memory, *times), None

    (latents, _), _ = jax.lax.scan(body, (noise, stepper.init(noise)), (timesteps[:-1], timesteps[1:]))
    return latents


def initial_noise(seeds: UInt32[Array, "b"], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal latents, one clip per seed; a clip's noise depends on its seed and shape alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
