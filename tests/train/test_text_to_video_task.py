"""The loss of the patch transformer's task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core import rng
from vidgen.core.tokens import Tokens
from vidgen.diffusion.shift import RootShift
from vidgen.diffusion.timesteps import LogitNormal, Uniform
from vidgen.diffusion.weighting import CosMap, mean_weight
from vidgen.models.dit.config import VARIANTS as DIT_VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.task import Context
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


def context(model, vae, batch, key):
    return Context(model=model, frozen={"vae": vae}, batch=batch, key=key)


def test_draws_of_one_clip_are_those_of_the_clip_repeated():
    once, twice = _task(), _task(draws_per_clip=2)
    model = random_module(lambda: once.build(nnx.Rngs(0)))  # untrained, it would not look at the text
    vae = VideoVAE(VAE_VARIANTS["tiny"], rngs=nnx.Rngs(1))
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    batch = once.arrays({"video": video, "caption": ["left", "a red circle"]})
    repeated = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    key = jax.random.key(2)
    loss = nnx.jit(lambda task, batch: task.loss(context(model, vae, batch, key))[0], static_argnums=0)
    np.testing.assert_allclose(loss(twice, batch), loss(once, repeated), rtol=1e-6)
    assert abs(loss(twice, batch) - loss(once, batch)) > 1e-3


def test_no_draws_is_an_error():
    with pytest.raises(ValueError, match="draws_per_clip is 0"):
        _task(draws_per_clip=0)


def test_weights_multiply_the_loss_of_each_clip():
    """One clip, so that the loss is its own: equal but for the weight of its timestep."""
    shifted = LogitNormal(shift=RootShift(base_tokens=2))
    plain, weighted = _task(density=shifted), _task(density=shifted, weighting=CosMap())
    model = random_module(lambda: plain.build(nnx.Rngs(0)))
    vae = VideoVAE(VAE_VARIANTS["tiny"], rngs=nnx.Rngs(1))
    video = np.random.default_rng(0).integers(0, 256, (1, 5, 16, 16, 3), np.uint8)
    batch = plain.arrays({"video": video, "caption": ["left"]})
    key = jax.random.key(2)
    loss = nnx.jit(lambda task, batch: task.loss(context(model, vae, batch, key))[0], static_argnums=0)
    num_tokens = np.prod(plain.dit.token_grid(*vae.config.latent_shape(5, 16, 16)[:3]))
    t = shifted.sample(rng.stream(key, "timestep"), 1, int(num_tokens))
    weight = (CosMap().weight(t) / mean_weight(CosMap(), shifted, int(num_tokens)))[0]
    assert abs(weight - 1) > 0.01
    np.testing.assert_allclose(loss(weighted, batch), weight * loss(plain, batch), rtol=1e-5)


def test_stratified_draws_of_a_clip_are_spread_and_every_level_is_drawn_from():
    task = _task(draws_per_clip=4, density=Uniform(stratified=True))
    key = jax.random.key(3)
    tokens = Tokens(jnp.zeros((64, 10, 1)), np.zeros((1, 10, 3), np.int32))
    draws = np.asarray(task._timesteps(key, tokens, 1)[0]).reshape(16, 4)
    gaps = np.diff(np.sort(draws, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 0.25, atol=1e-6)
    np.testing.assert_allclose(np.diff(np.sort(draws.reshape(-1))), 1 / 64, atol=1e-6)
    # Rows of 2 places, each repeated 4 times: a clip's draws are 2 apart.
    clip_ids = jnp.tile(jnp.arange(10) // 5 + 1, (32, 1))
    tokens = tokens._replace(patches=tokens.patches[:32], clip_ids=clip_ids)
    packed = np.asarray(task._timesteps(key, tokens, 2)[0]).reshape(8, 4, 2)
    np.testing.assert_allclose(np.diff(np.sort(packed, axis=1), axis=1), 0.25, atol=1e-6)
