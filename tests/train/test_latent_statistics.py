import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core import pixels
from vidgen.core.tree import named_leaves
from vidgen.data.buckets import Bucket, Mixture
from vidgen.data.loader import Loader
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.latent_statistics import Moments, measure_latents, with_statistics
from vidgen.train.vae_folder import export_vae, load_vae

CONFIG = VAEConfig(
    base_dim=4, latent_channels=3, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)


class Clips:
    """Clips whose brightness differs a lot, so that few are far from all."""

    def __init__(self, count, size=(3, 8, 8)):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        low = int(rng.integers(0, 200))
        return {"video": rng.integers(low, low + 56, (*self.size, 3), np.uint8), "name": f"clip{index}"}


@pytest.fixture(scope="module")
def vae():
    return random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)))


@jax.jit
def encode(vae, video):
    return vae.encode(pixels.to_float(video))


@jax.jit
def raw_latents(vae, video):
    return vae.posterior(pixels.to_float(video)).mean


def measured(vae, source, *, batch_size, num_clips, **keywords):
    with Loader(source, batch_size=batch_size, seed=0) as loader:
        return measure_latents(vae, loader, num_clips=num_clips, **keywords)


def pooled(vae, clips):
    """Raw latents of clips, one by one: [n c], in float64."""
    raw = [np.asarray(raw_latents(vae, clip[None]), np.float64).reshape(-1, 3) for clip in clips]
    return np.concatenate(raw)


def test_merged_moments_are_those_of_all_numbers_even_far_from_zero():
    rng = np.random.default_rng(0)
    parts = [1e6 + rng.normal(size=(n, 2)) * [1.0, 3.0] + rng.normal() for n in (3, 50, 7, 1000)]
    of = lambda x: Moments(count=len(x), mean=x.mean(0), variance=x.var(0))  # noqa: E731
    merged = functools.reduce(Moments.merge, map(of, parts))
    whole = np.concatenate(parts)
    assert merged.count == len(whole)
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.variance, whole.var(0), rtol=1e-9)


def test_moments_are_those_of_all_latents_and_normalise_them(vae):
    source = Clips(24)
    moments = measured(vae, source, batch_size=8, num_clips=24)
    raw = pooled(vae, [source[index]["video"] for index in range(24)])
    assert moments.count == len(raw)
    np.testing.assert_allclose(moments.mean, raw.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.variance, raw.var(0), rtol=1e-5)

    mine = with_statistics(vae, moments)
    latents = [encode(mine, source[index]["video"][None]) for index in range(24)]
    latents = np.concatenate(latents).astype(np.float64)
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1.0, rtol=1e-5)


def test_latents_of_other_clips_are_normal_within_sampling_error(vae):
    count = 200
    mine = with_statistics(vae, measured(vae, Clips(count), batch_size=8, num_clips=count))
    others = np.stack([Clips(10**6)[index]["video"] for index in range(count, 2 * count)])
    latents = np.asarray(encode(mine, others), np.float64).reshape(count, -1, 3)
    # Clips are independent, the latents within one are not. Both halves vary: four standard errors of each.
    error = 4 * np.sqrt(2) * latents.mean(1).std(0) / np.sqrt(count)
    assert (np.abs(latents.mean((0, 1))) < error).all()
    squares = np.square(latents).mean(1)
    assert (np.abs(squares.mean(0) - 1.0) < 4 * np.sqrt(2) * squares.std(0) / np.sqrt(count)).all()


def test_the_result_does_not_depend_on_the_batch_size_or_the_mesh(vae):
    alone = measured(vae, Clips(40), batch_size=1, num_clips=21)
    for batch_size in (4, 8, 32):
        moments = measured(vae, Clips(40), batch_size=batch_size, num_clips=21)
        assert moments.count == alone.count
        np.testing.assert_allclose(moments.mean, alone.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(moments.variance, alone.variance, rtol=1e-6)
    mesh = MeshOptions(data=4, fsdp=2).build()
    with jax.set_mesh(mesh):
        moments = measured(vae, Clips(40), batch_size=8, num_clips=21, mesh=mesh)
    np.testing.assert_allclose(moments.mean, alone.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.variance, alone.variance, rtol=1e-6)


def test_clips_of_several_sizes_count_by_their_latents(vae):
    buckets = (Bucket(height=8, width=8, batch_size=4), Bucket(num_frames=5, height=4, width=8, batch_size=2))
    sources = (Clips(8, (1, 8, 8)), Clips(4, (5, 4, 8)))
    moments = measured(vae, Mixture(tuple(zip(buckets, sources, strict=True))), batch_size=1, num_clips=12)
    raw = pooled(vae, [source[i]["video"] for source in sources for i in range(len(source))])
    assert moments.count == len(raw) == 8 * 16 + 4 * 3 * 8
    np.testing.assert_allclose(moments.mean, raw.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.variance, raw.var(0), rtol=1e-5)


def opener(count):
    return functools.partial(Loader, Clips(count), batch_size=4, seed=0)


def test_a_kept_vae_has_the_statistics_of_its_own_weights(vae, tmp_path):
    for seed in (0, 1):
        model = random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)), seed)
        before = np.asarray(model.latents_mean[...])
        export_vae(model, tmp_path, step=seed, open_clips=opener(12), num_clips=100)
        kept = load_vae(tmp_path)
        raw = pooled(model, [Clips(12)[index]["video"] for index in range(12)])  # all, and each once
        np.testing.assert_allclose(kept.latents_mean[...], raw.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(kept.latents_variance[...], raw.var(0), rtol=1e-5)
        np.testing.assert_array_equal(model.latents_mean[...], before)  # the run goes on with its own
        np.testing.assert_array_equal(kept.encoder.conv_in.kernel[...], model.encoder.conv_in.kernel[...])


def test_statistics_can_be_left_as_they_are(vae, tmp_path):
    def never():
        raise AssertionError("clips are read")

    export_vae(vae, tmp_path, step=1, open_clips=never, num_clips=0)
    for name, leaf in named_leaves(load_vae(tmp_path)).items():
        np.testing.assert_array_equal(leaf, named_leaves(vae)[name])


def test_latents_that_are_not_finite_name_the_clips(vae):
    broken = jax.tree.map(lambda x: x, vae)
    broken.encoder.conv_out.bias[...] = jnp.full_like(broken.encoder.conv_out.bias[...], jnp.nan)
    with pytest.raises(ValueError, match=r"not finite; one of \['clip\d+', 'clip\d+'\]"):
        measured(broken, Clips(4), batch_size=2, num_clips=4)
    with pytest.raises(ValueError, match="at least one clip"):
        measure_latents(vae, [], num_clips=4)
