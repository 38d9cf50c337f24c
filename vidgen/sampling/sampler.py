"""Sampling as a state machine: `init_state`, then `step` for each timestep; the last state has the result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Int, Latents, Noisy, PyTree, UInt32
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
    """The state that one step passes to the next.

    Attributes:
      clean: prediction of the clean latents from the step's first velocity; None if states do not keep it.
    """

    latents: Noisy
    stepper: PyTree
    network: PyTree
    clean: Noisy | None = None


def init_state(
    network: StatefulNetwork, noise: Noisy, stepper: Stepper, *, keep_clean: bool = False
) -> SamplerState:
    """The state before the first step.

    Args:
      keep_clean: whether states keep the prediction of the clean latents.
    """
    clean = jnp.zeros_like(noise) if keep_clean else None
    return SamplerState(noise, stepper.init(noise), network.init(noise), clean)


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
    evaluations = stepper.step(state.latents, state.stepper, t, t_next)
    (latents, time), clean, network_state = next(evaluations), state.clean, None
    while True:
        model_time = jnp.where(time == t, model_times[number], model_times[number + 1])
        batch_times = jnp.full(latents.shape[0], model_time)
        velocity, new_state = network.apply(latents, batch_times, state.network, number)
        if network_state is None:
            network_state = new_state
            clean = None if clean is None else latents - time * velocity
        try:
            latents, time = evaluations.send(velocity)
        except StopIteration as stop:
            latents, stepper_state = stop.value
            return SamplerState(latents, stepper_state, network_state, clean)


def sample(
    network: VelocityNetwork | StatefulNetwork, noise: Noisy, *, grid: TimeGrid, stepper: Stepper
) -> Noisy:
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
