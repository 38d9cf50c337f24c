"""Guidance of one's own: classifier-free guidance whose change of the velocity is limited.

vidgen train --config examples/guidance.py --workdir runs/guidance
vidgen sample --trust --checkpoint runs/guidance --prompt "a red circle moves left" --out a.mp4
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.experiments.dit import sprites


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitedGuidance:
    """A `vidgen.sampling.guidance.Guidance`.

    Attributes:
      limit: largest norm of the change relative to that of the prompt's velocity, for each video.
    """

    limit: float = 1.0

    def init(self, latents):
        return ()

    def combine(self, positive, negative, *, latents, timestep, scale, state, step, where=None):
        change = (scale - 1.0) * (positive - negative)
        if where is not None:  # Velocity of known latents is 0.
            positive, change = jnp.where(where, positive, 0.0), jnp.where(where, change, 0.0)
        largest = self.limit * _norm(positive)
        factor = jnp.minimum(1.0, largest / jnp.maximum(_norm(change), 1e-12))
        return positive + factor * change, state


def _norm(x):
    return jnp.sqrt(jnp.square(x).sum(tuple(range(1, x.ndim)), keepdims=True))


def get_config(arg: str = "tiny") -> ConfigDict:
    """The sprites experiment, sampled with this guidance."""
    config = sprites.get_config(arg)
    task: Any = config.task
    task.sampling = {"guidance": LimitedGuidance(limit=0.5), "guidance_scale": 6.0}
    return config
