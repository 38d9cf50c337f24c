"""The loss of the patch transformer's task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.dit.config import VARIANTS as DIT_VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.text_to_video_task import TextToVideoTask


def _task(**options) -> TextToVideoTask:
    vae = VAE_VARIANTS["tiny"]
    return TextToVideoTask(
        vae="unused",
        dit=dataclasses.replace(DIT_VARIANTS["tiny"], in_channels=vae.latent_channels, text_dim=32),
        text=ByteEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=32, max_bytes=16),
        caption_dropout=0.0,
        **options,
    )


def test_draws_of_one_clip_are_those_of_the_clip_repeated():
    once, twice = _task(), _task(draws_per_clip=2)
    model = random_module(lambda: once.build(nnx.Rngs(0)))  # untrained, it would not look at the text
    vae = VideoVAE(VAE_VARIANTS["tiny"], rngs=nnx.Rngs(1))
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    batch = once.arrays({"video": video, "caption": ["left", "a red circle"]})
    repeated = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    key, step = jax.random.key(2), jnp.asarray(0)
    loss = nnx.jit(lambda task, batch: task.loss(model, vae, batch, key, step)[0], static_argnums=0)
    np.testing.assert_allclose(loss(twice, batch), loss(once, repeated), rtol=1e-6)
    assert abs(loss(twice, batch) - loss(once, batch)) > 1e-3


def test_no_draws_is_an_error():
    with pytest.raises(ValueError, match="draws_per_clip is 0"):
        _task(draws_per_clip=0)
