"""A condition of one's own: the mean colour of a video.

vidgen train --config examples/conditioner.py --workdir runs/colour
vidgen sample --trust --checkpoint runs/colour --prompt "a circle" --extra colour=[1,0,0] --out a.mp4
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.core.errors import UserError
from vidgen.core.streams import Stream
from vidgen.experiments.dit import sprites
from vidgen.sampling.conditioning import Condition

NAME = "colour"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanColour:
    """A `vidgen.sampling.conditioning.TrainingConditioner`: one feature of red, green and blue per clip.

    Attributes:
      dropout: share of clips that are trained without it (black).
    """

    dropout: float = 0.1

    fields: ClassVar = frozenset({NAME})
    provides: ClassVar = frozenset({NAME})
    key_name: ClassVar = NAME
    needs_video: ClassVar = True

    def check(self, dit, vae):
        pass

    def host(self, captions):
        return {}  # No array besides the video.

    def host_spec(self, sequences, clips):
        return {}

    def observe(self, clips, key):
        colour = 0.5 * clips.video.mean((1, 2, 3)) + 0.5
        dropped = jax.random.bernoulli(key, self.dropout, (len(colour), 1))
        return Condition({NAME: Stream(jnp.where(dropped, 0.0, colour)[:, None])})

    def from_request(self, request, target):
        colour = request.extras.get(NAME, (0.0, 0.0, 0.0))
        if len(colour) != 3:
            raise UserError(f"{NAME}: found {colour}; expected red, green and blue from 0 to 1")
        features = jnp.broadcast_to(jnp.asarray(colour, jnp.float32), (target.count, 1, 3))
        return Condition({NAME: Stream(features)}, negative={NAME: Stream(jnp.zeros_like(features))})


def get_config(arg: str = "tiny") -> ConfigDict:
    """The sprites experiment with this condition, which modulates the transformer like the timestep."""
    config = sprites.get_config(arg)
    task: Any = config.task
    task.dit.streams = ({"name": NAME, "dim": 3, "enters": "modulation"},)
    task.conditioners = (MeanColour(),)
    return config
