"""One step of a stepper with a function as network, and a denoiser that is a function."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp


def take_step(stepper, network, latents, state, t, t_next):
    """Latents and state after a step; `network` maps latents and timesteps to velocity."""
    evaluations, velocity = stepper.step(latents, state, jnp.asarray(t), jnp.asarray(t_next)), None
    while True:
        try:
            x, time = evaluations.send(velocity)
        except StopIteration as stop:
            return stop.value
        velocity = network(x, jnp.full(len(x), time))


@dataclasses.dataclass(frozen=True)
class Stateless:
    """`Denoiser` without state."""

    velocity: Callable

    def init(self, latents):
        return ()

    def apply(self, latents, timestep, condition, state, step):
        return self.velocity(latents, timestep, condition), state
