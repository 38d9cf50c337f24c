"""Noise to latents: a time grid and a stepper, one step at a time or under one `lax.scan`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Int, Latents, PyTree, UInt32
from vidgen.sampling.network import Memoryless, SteppedNetwork
from vidgen.sampling.steppers import Stepper
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["SamplerState", "Times", "advance", "begin", "initial_noise", "sample"]


class Times(NamedTuple):
    """Timesteps at the boundaries of the steps; may go on beyond the last with any values.

    Attributes:
      visited: by the stepper, decreasing to 0.
      told: what the network is told there.
    """

    visited: Float[np.ndarray, "s"] | Float[Array, "s"]
    told: Float[np.ndarray, "s"] | Float[Array, "s"]


class SamplerState(NamedTuple):
    """What is carried from step to step."""

    latents: Latents
    stepper: PyTree
    network: PyTree


def begin(network: SteppedNetwork, noise: Latents, stepper: Stepper) -> SamplerState:
    """The state before the first step."""
    return SamplerState(noise, stepper.init(noise), network.init(noise))


def advance(
    network: SteppedNetwork, state: SamplerState, step: Int[Array, ""], times: Times, stepper: Stepper
) -> SamplerState:
    """The state after step number `step`, from 0.

    The network's state is read at the start of the step and replaced by what the step's first call leaves,
    which is the call at the timestep where the step begins. A stepper that calls twice (Heun) therefore
    integrates one velocity field per step.
    """
    visited, told = jnp.asarray(times.visited), jnp.asarray(times.told)
    t, t_next = visited[step], visited[step + 1]
    left: list[PyTree] = []

    def telling(latents: Latents, timestep: Array) -> Latents:
        timestep = jnp.where(timestep == t, told[step], told[step + 1])
        velocity, new = network.apply(latents, timestep, state.network, step)
        left.append(new)
        return velocity

    latents, memory = stepper.step(telling, state.latents, state.stepper, t, t_next)
    return SamplerState(latents, memory, left[0])


def sample(
    network: VelocityNetwork | SteppedNetwork, noise: Latents, *, grid: TimeGrid, stepper: Stepper
) -> Latents:
    """Integrates from noise at t = 1 to clean latents at t = 0: all steps as one program."""
    stepped = network if isinstance(network, SteppedNetwork) else Memoryless(network)
    times = Times(grid.timesteps(), grid.told())

    def body(state: SamplerState, step: Array) -> tuple[SamplerState, None]:
        return advance(stepped, state, step, times, stepper), None

    state, _ = jax.lax.scan(body, begin(stepped, noise, stepper), jnp.arange(grid.num_steps))
    return state.latents


def initial_noise(seeds: UInt32[Array, "b"], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal latents, one clip per seed; a clip's noise depends on its seed and shape alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
