"""A kind of training of one's own: rectified flow on pixels, without a VAE and without text.

vidgen train --config examples/task.py --workdir runs/pixels
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.core import pixels, rng
from vidgen.core.streams import TEXT, Stream
from vidgen.core.tokens import Tokens, patchify
from vidgen.diffusion.rectified_flow import velocity_loss
from vidgen.diffusion.timesteps import AnyDensity, LogitNormal
from vidgen.experiments.dit import sprites
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.nn.embeddings import grid_positions
from vidgen.train.video_task import VideoTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelFlow(VideoTask):
    """A `vidgen.train.task.ExperimentTask`."""

    kind: Literal["pixel_flow"] = "pixel_flow"
    dit: DiTConfig = DiTConfig(
        in_channels=3,
        patch_size=(1, 8, 8),
        model_dim=64,
        num_layers=2,
        num_heads=4,
        ffn_dim=128,
        text_dim=8,
    )
    density: AnyDensity = LogitNormal()

    @property
    def network(self):
        return "dit", self.dit

    def build(self, rngs):
        return DiT(self.dit, rngs=rngs)

    def check_size(self, num_frames, height, width):
        self.dit.token_grid(num_frames, height, width)

    def loss(self, context):
        """Mean loss, and metrics, of a batch of videos."""
        clean = pixels.to_float(context.batch.video)
        grid = self.dit.token_grid(*clean.shape[1:4])
        tokens = Tokens(patchify(clean, self.dit.patch_size), grid_positions(*grid)[None])
        noise = jax.random.normal(rng.stream(context.key, "noise"), tokens.patches.shape)
        key = rng.stream(context.key, "timestep")
        timestep = self.density.sample(key, len(clean), math.prod(grid))[:, None]
        streams = {TEXT: Stream(jnp.zeros((len(clean), 1, self.dit.text_dim)))}
        losses, _ = velocity_loss(lambda x, t: context.model(x, t, streams)[0], tokens, noise, timestep)
        return losses.mean(), {"pixel_std": clean.std()}


def get_config(arg: str = "tiny") -> ConfigDict:
    """The data and the optimizer of the sprites experiment, with this task."""
    config = sprites.get_config(arg)
    with config.unlocked(), config.ignore_type():
        config.task = PixelFlow()
    return config
