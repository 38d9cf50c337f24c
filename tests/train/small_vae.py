"""A VAE and a discriminator so small that a run takes seconds, and clips for them."""

import dataclasses

import numpy as np

from tests.train import toy
from vidgen.models.discriminator.config import DiscriminatorConfig
from vidgen.models.video_vae.config import VAEConfig
from vidgen.train.adversary import Adversary
from vidgen.train.optimizer import AdamW
from vidgen.train.vae_task import VAETask

FRAMES, SIDE = 3, 8
MODEL = VAEConfig(
    base_dim=4, latent_channels=3, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)
ADVERSARY = Adversary(
    discriminator=DiscriminatorConfig(base_dim=4, dim_mult=(1,), temporal_downsample=(True,)),
    # With a smaller eps the first update is the sign of gradients that are round-off.
    optimizer=AdamW(learning_rate=1e-2, warmup_steps=2, b1=0.5, eps=1e-3),
    weight=0.5,
    r1_weight=0.1,
    lecam_weight=0.2,
)
PLAIN = VAETask(model=MODEL, kl_weight=1e-2, statistics_clips=0)
ADVERSARIAL = dataclasses.replace(PLAIN, adversary=ADVERSARY)


class Clips(toy.ToyLoader):
    """Batch i is a function of i."""

    def __next__(self):
        shape = (self.batch_size, FRAMES, SIDE, SIDE, 3)
        video = np.random.default_rng(self.next).integers(0, 256, shape, dtype=np.uint8)
        return super().__next__() | {"video": video[self.rows]}


def train(workdir, task=PLAIN, **options):
    options = {"loader": Clips(8), "num_steps": 4, "checkpoint_every": 2} | options
    return toy.train(workdir, task=task, **options)
