import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import integrate, stats

from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import Posterior, VideoVAE
from vidgen.nn.variables import Buffer

CONFIG = VAEConfig(
    base_dim=4, latent_channels=3, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)
)


@pytest.fixture
def vae():
    """Not trained: only its statistics have values."""
    module = nnx.eval_shape(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)))
    module.latents_mean = Buffer(jnp.zeros(3))
    module.latents_variance = Buffer(jnp.ones(3))
    module.latents_count = Buffer(jnp.zeros(()))
    return module


def batches(count):
    rng = np.random.default_rng(0)
    scale, offset = rng.uniform(0.5, 4.0, (count, 3)), rng.normal(0.0, 3.0, (count, 3))
    return [
        (scale[i] * rng.normal(size=(2, 3, 4, 4, 3)) + offset[i]).astype(np.float32) for i in range(count)
    ]


def test_statistics_are_those_of_all_batches_so_far(vae):
    seen = batches(4)
    for number in range(1, 5):
        vae.update_statistics(jnp.asarray(seen[number - 1]))
        pooled = np.concatenate(seen[:number]).astype(np.float64)
        np.testing.assert_allclose(vae.latents_mean[...], pooled.mean((0, 1, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(vae.latents_variance[...], pooled.var((0, 1, 2, 3)), rtol=1e-5)
    everything = jnp.asarray(np.concatenate(seen))
    latents = np.asarray(vae.normalise(everything))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(vae.denormalise(jnp.asarray(latents)), everything, rtol=1e-4, atol=1e-5)


def test_after_a_hundred_batches_old_ones_fade(vae):
    vae.latents_count[...] = jnp.asarray(5000.0)
    vae.update_statistics(jnp.full((1, 1, 1, 1, 3), 10.0))
    # Mean 0 and variance 1 move by one hundredth; the batch itself has no variance.
    np.testing.assert_allclose(vae.latents_mean[...], 0.1, rtol=1e-5)
    np.testing.assert_allclose(vae.latents_variance[...], 1.0 + 0.01 * (0.99 * 100.0 - 1.0), rtol=1e-5)


def divergence(mean, log_variance):
    """KL(q, standard normal) by quadrature."""
    q, p = stats.norm(mean, np.exp(0.5 * log_variance)), stats.norm()
    low, high = q.interval(1 - 1e-13)
    return integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), low, high)[0]


def test_kl_against_quadrature():
    means, log_variances = [0.0, 1.5, -2.0, 0.3], [0.0, -3.0, 1.0, 0.2]
    shape = (1, 1, 2, 2, 1)
    posterior = Posterior(jnp.asarray(means).reshape(shape), jnp.asarray(log_variances).reshape(shape))
    expected = np.mean([divergence(*pair) for pair in zip(means, log_variances, strict=True)])
    np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-5)


def test_samples_have_the_posteriors_mean_and_variance():
    shape = (1, 1, 100, 100, 2)
    mean = jnp.broadcast_to(jnp.asarray([1.0, -2.0]), shape)
    log_variance = jnp.broadcast_to(jnp.log(jnp.asarray([0.25, 4.0])), shape)
    sample = np.asarray(Posterior(mean, log_variance).sample(jax.random.key(0))).reshape(-1, 2)
    # Five standard errors.
    np.testing.assert_allclose(sample.mean(0), [1.0, -2.0], atol=5 * 2.0 / 100)
    np.testing.assert_allclose(sample.var(0), [0.25, 4.0], rtol=5 * 2**0.5 / 100)
