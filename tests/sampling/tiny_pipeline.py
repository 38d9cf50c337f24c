"""A pipeline of small models with random weights: nothing that a result depends on is zero."""

import jax
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.pipeline import Pipeline
from vidgen.sampling.conditioners import Prompts
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.time_grid import TimeGrid

SIZE = (3, 8, 8)
LATENTS = (2, 4, 4, 4)
OPTIONS = SamplingOptions(grid=TimeGrid(num_steps=3), guidance_scale=3.0)
DIT = DiTConfig(in_channels=4, model_dim=32, num_layers=2, num_heads=2, ffn_dim=32, text_dim=16, freq_dim=8)
TEXT = ByteEncoderConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=16, max_bytes=8)
VAE = VAEConfig(base_dim=4, latent_channels=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))


def make_model(dit=DIT):
    return random_module(lambda: TextToVideo(DiT(dit, rngs=nnx.Rngs(0)), ByteEncoder(TEXT, rngs=nnx.Rngs(1))))


def make_vae():
    return random_module(lambda: VideoVAE(VAE, rngs=nnx.Rngs(0)))


def make_pipeline(model, vae, *conditioners, mesh=None, options=OPTIONS):
    """On one device unless a mesh is given; with `SIZE`."""
    conditioners = [Prompts(encode=BytePrompts(model)), *conditioners]
    mesh = MeshOptions(data=1).build(jax.devices()[:1]) if mesh is None else mesh
    return Pipeline(model, vae, conditioners, size=SIZE, fps=8.0, mesh=mesh, options=options)
