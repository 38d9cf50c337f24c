import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from tests.models.video_vae.test_streaming import normal
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.models.video_vae.tiling import Tiles

# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("size", [(20, 33), (8, 9), (5, 40)])
@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("factor", [1, 4])
def test_tiles_of_one_size_blend_to_the_frame_they_were_cut_from(size, overlap, factor):
    tiles = Tiles(height=8, width=9, overlap=overlap)
    x = normal(2, 3, size[0] * factor, size[1] * factor, 2)
    parts = tiles.split(x, factor)
    assert {part.shape[2:4] for part in parts} == {(min(8, size[0]) * factor, 9 * factor)}
    np.testing.assert_allclose(tiles.blend(parts, *size, factor), x, rtol=1e-5, atol=1e-6)


def test_between_two_tiles_one_fades_into_the_other():
    tiles = Tiles(height=4, width=6, overlap=2)
    parts = tiles.split(normal(1, 1, 4, 10, 1))
    assert len(parts) == 2
    blended = tiles.blend([0 * parts[0], 0 * parts[1] + 1], 4, 10)
    np.testing.assert_allclose(blended[0, 0, 0, :, 0], [0, 0, 0, 0, 0.25, 0.75, 1, 1, 1, 1], atol=1e-6)


def test_an_overlap_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="overlap=8 of tiles of 8 x 16: give 0 or more, and less"):
        Tiles(height=8, width=16, overlap=8)


@pytest.fixture(scope="module")
def vae():
    return random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)))


def test_one_tile_is_the_whole_frame(vae):
    latents = normal(1, 2, 4, 3, vae.config.latent_channels)
    tiles = Tiles(height=4, width=8, overlap=2)
    expected = jit(streaming.decode)(vae, latents)
    decoded = jit(lambda vae, z: streaming.decode(vae, z, tiles=tiles))(vae, latents)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_scan_and_stream_give_the_blend_of_tiles_done_alone(vae, direction):
    tiles = Tiles(height=2, width=3, overlap=1)
    latents = normal(1, 3, 4, 3, vae.config.latent_channels)
    if direction == "encode":
        x = jit(streaming.decode)(vae, latents)
        alone, scan = jit(lambda vae, x: vae.encode(x)), streaming.encode
        factors, stream = (vae.config.spatial_factor, 1), streaming.encode_stream
        fed = (np.asarray(x[:, i]) for i in range(x.shape[1]))
    else:
        x, fed = latents, [latents]
        alone, scan = jit(lambda vae, z: vae.decode(z)), streaming.decode
        factors, stream = (1, vae.config.spatial_factor), streaming.decode_stream
    parts = tiles.split(x, factors[0])
    assert len(parts) == 3
    expected = tiles.blend([alone(vae, part) for part in parts], 4, 3, factors[1])
    scanned = jit(lambda vae, x: scan(vae, x, tiles=tiles))(vae, x)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    streamed = np.concatenate(list(stream(vae, fed, tiles=tiles)), axis=1)
    np.testing.assert_allclose(streamed, expected, rtol=1e-5, atol=1e-5)
