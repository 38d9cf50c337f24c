import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.video_vae.config import VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.models.video_vae.variants import parameters, table

README = pathlib.Path(__file__).parents[3] / "README.md"
HIGH = {"base-8x16x16": (8, 16, 64), "base-8x32x32": (8, 32, 128), "small-8x16x16": (8, 16, 32)}
"""Frames and pixels per side for one latent, and channels."""


@pytest.mark.parametrize(
    "name", ["base-8x16x16", *(pytest.param(name, marks=pytest.mark.slow) for name in list(HIGH)[1:])]
)
def test_large_presets_have_the_latents_that_their_names_say(name):
    config, (frames, side, channels) = VARIANTS[name], HIGH[name]
    assert (config.temporal_factor, config.spatial_factor, config.latent_channels) == (frames, side, channels)
    vae = nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    video = jax.ShapeDtypeStruct((2, 1 + 2 * frames, 3 * side, 2 * side, 3), jnp.float32)
    latents = jax.eval_shape(lambda vae, video: vae.encode(video), vae, video)
    assert latents.shape == (2, 3, 3, 2, channels)
    assert jax.eval_shape(lambda vae, latents: vae.decode(latents), vae, latents).shape == video.shape
    with pytest.raises(ValueError, match=r"num_frames=5 is not 1 \+ 8 n; use 1 or 9"):
        config.latent_shape(5, side, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base-8x16x16", "base-8x32x32"])
def test_a_narrow_copy_encodes_and_decodes_images_and_clips(name):
    config = dataclasses.replace(
        VARIANTS[name], base_dim=4, decoder_base_dim=8, latent_channels=4, num_res_blocks=1
    )
    side = config.spatial_factor
    vae = random_module(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 9, side, 2 * side, 3)), jnp.float32)
    both = jax.jit(lambda vae, video: (latents := vae.encode(video), vae.decode(latents)))
    latents, decoded = both(vae, video)
    assert latents.shape == (1, 2, 1, 2, 4) and decoded.shape == video.shape
    image, shown = both(vae, video[:, :1])
    np.testing.assert_allclose(image, latents[:, :1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shown, decoded[:, :1], rtol=1e-4, atol=1e-5)
    assert np.isfinite(decoded).all() and float(jnp.std(latents[:, 1])) > 1e-3


def test_the_readme_has_the_sizes_of_the_presets():
    lines = table(HIGH).splitlines()
    text = README.read_text()
    assert [line for line in lines if line not in text] == []


def test_parameters_are_those_of_both_halves():
    encoder, decoder = parameters(VARIANTS["tiny"])
    vae = nnx.eval_shape(lambda: VideoVAE(VARIANTS["tiny"], rngs=nnx.Rngs(0)))
    assert encoder + decoder == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(vae, nnx.Param, graph=False))
    )
