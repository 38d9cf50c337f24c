"""Noise to latents: a time grid and a stepper under one `lax.scan`."""

import jax
import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Latents, PyTree, UInt32
from vidgen.sampling.steppers import Stepper
from vidgen.sampling.time_grid import TimeGrid


def sample(network: VelocityNetwork, noise: Latents, *, grid: TimeGrid, stepper: Stepper) -> Latents:
    """Integrates from noise at t = 1 to clean latents at t = 0."""
    timesteps, told = jnp.asarray(grid.timesteps()), jnp.asarray(grid.told())

    def body(carry: tuple[Latents, PyTree], index: Array) -> tuple[tuple[Latents, PyTree], None]:
        latents, memory = carry
        t, t_next = timesteps[index], timesteps[index + 1]

        def telling(latents: Latents, timestep: Array) -> Latents:
            return network(latents, jnp.where(timestep == t, told[index], told[index + 1]))

        return stepper.step(telling, latents, memory, t, t_next), None

    steps = jnp.arange(grid.num_steps)
    (latents, _), _ = jax.lax.scan(body, (noise, stepper.init(noise)), steps)
    return latents


def initial_noise(seeds: UInt32[Array, "b"], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal latents, one clip per seed; a clip's noise depends on its seed and shape alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
