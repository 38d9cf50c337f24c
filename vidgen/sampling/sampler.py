"""Noise to latents: a time grid and a stepper under one `lax.scan`."""

import jax
import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Latents, PyTree, UInt32
from vidgen.sampling.network import Memoryless, SteppedNetwork
from vidgen.sampling.steppers import Stepper
from vidgen.sampling.time_grid import TimeGrid


def sample(
    network: VelocityNetwork | SteppedNetwork, noise: Latents, *, grid: TimeGrid, stepper: Stepper
) -> Latents:
    """Integrates from noise at t = 1 to clean latents at t = 0.

    What a network keeps between steps is held while a step lasts: each call of it sees what the last step
    left, and the first call, at the timestep where the step begins, makes what the next one finds. So a
    stepper that calls it twice integrates one velocity field per step.
    """
    timesteps, told = jnp.asarray(grid.timesteps()), jnp.asarray(grid.told())
    stepped = network if isinstance(network, SteppedNetwork) else Memoryless(network)

    def body(
        carry: tuple[Latents, PyTree, PyTree], step: Array
    ) -> tuple[tuple[Latents, PyTree, PyTree], None]:
        latents, memory, kept = carry
        t, t_next = timesteps[step], timesteps[step + 1]
        left: list[PyTree] = []

        def telling(latents: Latents, timestep: Array) -> Latents:
            timestep = jnp.where(timestep == t, told[step], told[step + 1])
            velocity, new = stepped.apply(latents, timestep, kept, step)
            left.append(new)
            return velocity

        latents, memory = stepper.step(telling, latents, memory, t, t_next)
        return (latents, memory, left[0]), None

    steps = jnp.arange(grid.num_steps)
    (latents, _, _), _ = jax.lax.scan(body, (noise, stepper.init(noise), stepped.init(noise)), steps)
    return latents


def initial_noise(seeds: UInt32[Array, "b"], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal latents, one clip per seed; a clip's noise depends on its seed and shape alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
