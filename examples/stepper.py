"""A sampler of one's own: the two-step Adams-Bashforth method.

vidgen train --config examples/stepper.py --workdir runs/stepper
vidgen sample --trust --checkpoint runs/stepper --prompt "a red circle moves left" --out a.mp4
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.experiments.dit import sprites


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamsBashforth:
    """A `vidgen.sampling.steppers.Stepper`: second order, with one call of the network per step."""

    def init(self, latents):
        return {"velocity": jnp.zeros_like(latents), "t": jnp.asarray(jnp.inf)}

    def step(self, latents, state, t, t_next):
        velocity = yield latents, t
        # The slope between the last two velocities, extrapolated to the middle of the step; 0 at first.
        weight = 0.5 * (t_next - t) / (t - state["t"])
        slope = weight * (velocity - state["velocity"])
        return latents + (t_next - t) * (velocity + slope), {"velocity": velocity, "t": t}


def get_config(arg: str = "tiny") -> ConfigDict:
    """The sprites experiment, sampled by this method."""
    config = sprites.get_config(arg)
    task: Any = config.task
    task.sampling = {"stepper": AdamsBashforth(), "grid": {"num_steps": 20}}
    return config
