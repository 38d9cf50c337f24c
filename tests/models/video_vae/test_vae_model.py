import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core.tree import count
from vidgen.models.video_vae.config import VARIANTS, VAEConfig
from vidgen.models.video_vae.model import VideoVAE

SMALL = {"base_dim": 4, "latent_channels": 3, "dim_mult": (1, 2, 2), "num_res_blocks": 1}
CONFIGS = {
    "shortcuts and patches": VAEConfig(
        **SMALL, temporal_downsample=(True, True), patch_size=2, level_shortcuts=True
    ),
    "as Wan 2.1": VAEConfig(**SMALL, temporal_downsample=(False, True)),
}
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = jit(lambda vae, video: vae.encode(video))
decode = jit(lambda vae, latents: vae.decode(latents))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


LATENTS = normal(1, 3, 2, 2, 3)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def vae(request):
    return random_module(lambda: VideoVAE(request.param, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def clip(vae):
    """Pixels of two groups of frames after the first."""
    config = vae.config
    return normal(1, 2 * config.temporal_factor + 1, 2 * config.spatial_factor, 2 * config.spatial_factor, 3)


def variants(x):
    """`x`, then `x` with each of its frames changed in turn, as a batch."""
    changed = [x.at[:, k].set(normal(*x[:, k].shape, seed=k + 1)) for k in range(x.shape[1])]
    return jnp.concatenate([x, *changed])


@pytest.fixture(scope="module")
def encoded(vae, clip):
    return encode(vae, variants(clip))


@pytest.fixture(scope="module")
def decoded(vae):
    return decode(vae, variants(LATENTS))


def change_per_frame(made):
    """[changed frame, output frame]: the largest difference from the first of the batch."""
    return np.abs(made[1:] - made[:1]).max(axis=(2, 3, 4))


def test_a_latent_depends_on_no_frame_after_its_group(vae, encoded):
    factor = vae.config.temporal_factor
    change = change_per_frame(encoded)
    assert change.shape == (2 * factor + 1, 3)
    for frame in range(2 * factor + 1):
        group = -(-frame // factor)
        assert change[frame, :group].max(initial=0.0) < 1e-5, f"frame {frame} reaches into the past"
        assert change[frame, group] > 1e-3, f"latent {group} ignores frame {frame}"


def test_a_pixel_depends_on_no_latent_after_its_group(vae, decoded):
    factor = vae.config.temporal_factor
    change = change_per_frame(decoded)
    assert change.shape == (3, 2 * factor + 1)
    for latent in range(3):
        first = 0 if latent == 0 else 1 + (latent - 1) * factor
        assert change[latent, :first].max(initial=0.0) < 1e-5, f"latent {latent} reaches into the past"
        group = change[latent, first : latent * factor + 1]
        assert len(group) and group.min() > 1e-3, f"frames from {first} ignore latent {latent}"


def test_an_image_is_the_first_frame_of_a_video(vae, clip, encoded, decoded):
    np.testing.assert_allclose(encode(vae, clip[:, :1]), encoded[:1, :1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decode(vae, LATENTS[:, :1]), decoded[:1, :1], rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_the_config(vae, clip, encoded, decoded):
    assert encoded.shape[1:] == vae.config.latent_shape(*clip.shape[1:4]) == (3, 2, 2, 3)
    assert decoded.shape[1:] == clip.shape[1:]
    assert encoded.dtype == decoded.dtype == jnp.float32


def test_latents_are_normalised_posterior_means(vae, clip):
    image = clip[:, :1]
    raw = np.asarray(jit(lambda vae, image: vae.posterior(image))(vae, image).mean)
    mean, deviation = np.asarray(vae.latents_mean[...]), np.sqrt(vae.latents_variance[...])
    assert np.abs(mean).min() > 1e-3, "statistics that would be seen"
    latents = encode(vae, image)
    np.testing.assert_allclose(latents, (raw - mean) / deviation, rtol=1e-4, atol=1e-5)
    decoded_raw = jit(lambda vae, raw: vae.decode_raw(raw))(vae, raw)
    np.testing.assert_allclose(decode(vae, latents), decoded_raw, rtol=1e-4, atol=1e-4)


def with_config(vae, **changes):
    """The same weights in another configuration."""
    config = dataclasses.replace(vae.config, **changes)
    graphdef = nnx.split(nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0))), graph=False)[0]
    return nnx.merge(graphdef, nnx.split(vae, graph=False)[1])


def test_16_bit_compute_is_close(vae, clip):
    exact, rounded = (encode(model, clip[:, :1]) for model in (vae, with_config(vae, dtype="bfloat16")))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.1


def test_remat_does_not_change_gradients():
    config = dataclasses.replace(CONFIGS["as Wan 2.1"], dim_mult=(2,), temporal_downsample=())
    vae = random_module(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    gradient = jax.grad(lambda model: jnp.square(model.posterior(normal(1, 3, 4, 4, 3)).mean).mean())
    recomputing = with_config(vae, remat="full")
    assert "remat" in str(jax.make_jaxpr(gradient)(recomputing))
    assert "remat" not in str(jax.make_jaxpr(gradient)(vae))
    plain, recomputed = jit(gradient)(vae), jit(gradient)(recomputing)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        nnx.state(recomputed.encoder, graph=False),
        nnx.state(plain.encoder, graph=False),
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain.encoder)) > 1e-3


def test_wan_has_as_many_parameters():
    vae = nnx.eval_shape(lambda: VideoVAE(VARIANTS["wan2.1"], rngs=nnx.Rngs(0)))
    assert count(nnx.state(vae, nnx.Param)) == 126_892_531


def test_sizes_that_do_not_fit_are_errors_that_name_those_that_do():
    config = VAEConfig()
    assert config.latent_shape(17, 64, 128) == (5, 8, 16, 16)
    for size, message in {
        (16, 64, 64): r"num_frames=16 is not 1 \+ 4 n; use 13 or 17",
        (0, 64, 64): "num_frames=0 is not .* use 1 or 5",
        (17, 60, 64): "height=60 is not a multiple of 8; use 56 or 64",
        (17, 64, 7): "width=7 is not a multiple of 8; use 8$",
    }.items():
        with pytest.raises(ValueError, match=message):
            config.latent_shape(*size)
    with pytest.raises(ValueError, match="one entry for each of the 2 steps"):
        VAEConfig(dim_mult=(1, 2, 4))
    vae = nnx.eval_shape(lambda: VideoVAE(CONFIGS["as Wan 2.1"], rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="num_frames=2 is not"):
        vae.posterior(normal(1, 2, 8, 8, 3))
