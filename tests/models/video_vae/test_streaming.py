import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE

SMALL = {"base_dim": 4, "latent_channels": 3, "dim_mult": (1, 2, 2), "num_res_blocks": 1}
CONFIGS = {
    "as Wan 2.1": VAEConfig(**SMALL, temporal_downsample=(False, True)),
    "as Wan 2.2": VAEConfig(**SMALL, temporal_downsample=(True, True), patch_size=2, level_shortcuts=True),
}
PARAMS = [pytest.param(CONFIGS["as Wan 2.1"], marks=pytest.mark.slow), CONFIGS["as Wan 2.2"]]
"""The second has all that the first has, and more: shortcuts, patches, two steps in time."""
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = jit(lambda vae, video: vae.encode(video))
decode = jit(lambda vae, latents: vae.decode(latents))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module", params=PARAMS, ids=CONFIGS.keys())
def vae(request):
    return random_module(lambda: VideoVAE(request.param, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def clip(vae):
    """Five groups: frame 0 and four more."""
    side = vae.config.spatial_factor
    return normal(2, 1 + 4 * vae.config.temporal_factor, 2 * side, side, 3)


@pytest.fixture(scope="module")
def latents(vae, clip):
    return encode(vae, clip)


@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_scans_give_what_the_whole_clip_gives(vae, clip, latents, group):
    scanned = jit(lambda vae, video: streaming.encode(vae, video, group=group))(vae, clip)
    np.testing.assert_allclose(scanned, latents, rtol=1e-5, atol=1e-5)
    scanned = jit(lambda vae, z: streaming.decode(vae, z, group=group))(vae, latents)
    np.testing.assert_allclose(scanned, decode(vae, latents), rtol=1e-5, atol=1e-5)


def test_an_image_is_a_stream_of_one_group(vae, clip, latents):
    encoded = jit(streaming.encode)(vae, clip[:, :1])
    np.testing.assert_allclose(encoded, latents[:, :1], rtol=1e-5, atol=1e-5)


def test_streams_hand_out_groups_as_they_come(vae, clip, latents):
    asked = []

    def frames():
        for index in range(clip.shape[1]):
            asked.append(index)
            yield np.asarray(clip[:, index])

    encoded = []
    for block in streaming.encode_stream(vae, frames()):
        encoded.append(block)
        assert len(asked) == 1 + (len(encoded) - 1) * vae.config.temporal_factor, "no frame is read ahead"
    np.testing.assert_allclose(np.concatenate(encoded, axis=1), latents, rtol=1e-5, atol=1e-5)
    decoded = list(streaming.decode_stream(vae, encoded))
    assert [block.shape[1] for block in decoded] == [1] + [vae.config.temporal_factor] * 4
    np.testing.assert_allclose(np.concatenate(decoded, axis=1), decode(vae, latents), rtol=1e-5, atol=1e-5)
    whole = list(streaming.decode_stream(vae, [latents]))
    np.testing.assert_allclose(np.concatenate(whole, axis=1), decode(vae, latents), rtol=1e-5, atol=1e-5)


def test_lengths_between_groups_are_filled_by_the_last_frame_and_cropped(vae, clip):
    factor = vae.config.temporal_factor
    count = 2 * factor  # one frame short of 1 + 2 * factor
    filled = jnp.concatenate([clip[:, :count], clip[:, count - 1 : count]], axis=1)
    assert streaming.padded_frames(count, factor) == filled.shape[1]
    assert [streaming.padded_frames(n, 4) for n in (1, 2, 5, 6, 17)] == [1, 5, 5, 9, 17]
    blocks = list(streaming.encode_stream(vae, (np.asarray(clip[:, i]) for i in range(count))))
    expected = encode(vae, filled)
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), expected, rtol=1e-5, atol=1e-5)
    frames = np.concatenate(list(streaming.decode_stream(vae, blocks, num_frames=count)), axis=1)
    np.testing.assert_allclose(frames, decode(vae, expected)[:, :count], rtol=1e-5, atol=1e-5)
    assert list(streaming.decode_stream(vae, blocks, num_frames=0)) == []
