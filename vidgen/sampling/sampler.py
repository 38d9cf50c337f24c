"""Sampling as a state machine: `init_state`, then `step` for each timestep; the last state has the result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Int, Latents, PyTree, UInt32
from vidgen.sampling.network import StatefulNetwork, StatelessNetwork
from vidgen.sampling.steppers import Stepper
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["SamplerState", "Timesteps", "init_state", "initial_noise", "sample", "step"]


class Timesteps(NamedTuple):
    """Timesteps at the boundaries of the steps; entries after the last step are padding.

    Attributes:
      solver: timesteps of the stepper, decreasing to 0.
      model: timesteps passed to the network; equal to `solver` unless `TimeGrid.convention` rounds them.
    """

    solver: Float[np.ndarray, "s"] | Float[Array, "s"]
    model: Float[np.ndarray, "s"] | Float[Array, "s"]


class SamplerState(NamedTuple):
    """The state that one step passes to the next."""

    latents: Latents
    stepper: PyTree
    network: PyTree


def init_state(network: StatefulNetwork, noise: Latents, stepper: Stepper) -> SamplerState:
    """The state before the first step."""
    return SamplerState(noise, stepper.init(noise), network.init(noise))


def step(
    network: StatefulNetwork,
    state: SamplerState,
    number: Int[Array, ""],
    timesteps: Timesteps,
    stepper: Stepper,
) -> SamplerState:
    """The state after one step.

    Network state is read at the start of the step and replaced by the state of the step's first call. A
    solver with two evaluations (Heun) therefore integrates one velocity field per step.

    Args:
      number: of the step, from 0.
    """
    times, model_times = jnp.asarray(timesteps.solver), jnp.asarray(timesteps.model)
    t, t_next = times[number], times[number + 1]
    states: list[PyTree] = []

    def velocity(latents: Latents, timestep: Array) -> Latents:
        timestep = jnp.where(timestep == t, model_times[number], model_times[number + 1])
        velocity, new = network.apply(latents, timestep, state.network, number)
        states.append(new)
        return velocity

    latents, stepper_state = stepper.step(velocity, state.latents, state.stepper, t, t_next)
    return SamplerState(latents, stepper_state, states[0])


def sample(
    network: VelocityNetwork | StatefulNetwork, noise: Latents, *, grid: TimeGrid, stepper: Stepper
) -> Latents:
    """Integrates from noise at t = 1 to clean latents at t = 0: a scan over all steps, in one program."""
    stateful = network if isinstance(network, StatefulNetwork) else StatelessNetwork(network)
    timesteps = Timesteps(grid.timesteps(), grid.model_timesteps())

    def body(state: SamplerState, number: Array) -> tuple[SamplerState, None]:
        return step(stateful, state, number, timesteps, stepper), None

    state, _ = jax.lax.scan(body, init_state(stateful, noise, stepper), jnp.arange(grid.num_steps))
    return state.latents


def initial_noise(seeds: UInt32[Array, "b"], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal latents, one clip per seed; a clip's noise depends on its seed and shape alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
