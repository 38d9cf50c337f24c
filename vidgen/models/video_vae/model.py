"""The causal video autoencoder: pixels to normalised latents and back; an image is a one-frame video."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Float, Latents, Video
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.modules import DownBlock, MidBlock, Step, UpBlock
from vidgen.nn.layers import CausalCache, CausalConv3d, pixel_shuffle, pixel_unshuffle
from vidgen.nn.norms import ChannelNorm
from vidgen.nn.variables import Buffer

_MIN_RATE = 0.01
"""Smallest weight of a batch in the running latent statistics."""


class Posterior(NamedTuple):
    """A diagonal Gaussian over raw (not normalised) latents."""

    mean: Float[Array, "b t h w c"]
    log_variance: Float[Array, "b t h w c"]

    def sample(self, key: Array) -> Float[Array, "b t h w c"]:
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> Float[Array, ""]:
        """KL divergence from the standard normal, in nats, averaged over latent elements."""
        variance = jnp.exp(self.log_variance)
        return 0.5 * (jnp.square(self.mean) + variance - 1.0 - self.log_variance).mean()


class Encoder(nnx.Module):
    """Maps pixels to the posterior's mean and log variance, concatenated along channels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.remat = config.remat
        self.conv_in = CausalConv3d(3 * config.patch_size**2, dims[0], (3, 3, 3), rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                dim_in,
                dim_out,
                num_blocks=config.num_res_blocks,
                step=step,
                shortcut=config.level_shortcuts,
                rngs=rngs,
            )
            for dim_in, dim_out, step in zip(dims, dims[1:], _steps(config.temporal_downsample), strict=False)
        )
        self.mid_block = MidBlock(dims[-1], rngs=rngs)
        self.norm_out = ChannelNorm(dims[-1], rngs=rngs)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.latent_channels, (3, 3, 3), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 o"]:
        x = self.conv_in(x, cache)
        x = _run([*self.down_blocks, self.mid_block], x, cache, remat=self.remat == "full")
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class Decoder(nnx.Module):
    """Maps raw (not normalised) latents to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        mults = config.dim_mult[::-1]
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        dims = [base * mult for mult in (mults[0], *mults)]
        self.remat = config.remat
        self.conv_in = CausalConv3d(config.latent_channels, dims[0], (3, 3, 3), rngs=rngs)
        self.mid_block = MidBlock(dims[0], rngs=rngs)
        # Without shortcuts, upsampling halves the channels before the next level.
        input_dims = [dims[0], *(dim if config.level_shortcuts else dim // 2 for dim in dims[1:])]
        self.up_blocks = nnx.List(
            UpBlock(
                dim_in,
                dim_out,
                num_blocks=config.num_res_blocks + 1,
                step=step,
                shortcut=config.level_shortcuts,
                rngs=rngs,
            )
            for dim_in, dim_out, step in zip(
                input_dims, dims[1:], _steps(config.temporal_downsample[::-1]), strict=False
            )
        )
        self.norm_out = ChannelNorm(dims[-1], rngs=rngs)
        self.conv_out = CausalConv3d(dims[-1], 3 * config.patch_size**2, (3, 3, 3), rngs=rngs)

    def __call__(
        self, z: Float[Array, "b t h w c"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 o"]:
        x = self.conv_in(z, cache)
        x = _run([self.mid_block, *self.up_blocks], x, cache, remat=self.remat == "full")
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


def _steps(temporal: tuple[bool, ...]) -> list[Step | None]:
    """Resampling step after each level; None after the last."""
    return [*(Step(flag) for flag in temporal), None]


def _run(blocks: list, x: Array, cache: CausalCache | None, *, remat: bool) -> Array:
    for block in blocks:
        # Blocks write to the cache, and jax.checkpoint allows no side effects; training uses no cache.
        if remat and cache is None:
            x = jax.checkpoint(lambda block, x: block(x))(block, x)
        else:
            x = block(x, cache)
    return x


def first_statistics(config: VAEConfig) -> tuple[Array, Array, Array]:
    """Initial mean and variance of each latent channel, and the number of batches that they count as."""
    z = config.latent_channels
    mean = jnp.asarray(config.latents_mean or (0.0,) * z, jnp.float32)
    deviation = jnp.asarray(config.latents_std or (1.0,) * z, jnp.float32)
    return mean, jnp.square(deviation), jnp.asarray(1.0 / _MIN_RATE if config.latents_mean else 0.0)


class VideoVAE(nnx.Module):
    """KL autoencoder, causal in time: frame 0 and each `temporal_factor` frames after it are a latent frame.

    A latent frame does not depend on later frames. `encode` and `decode` use latents normalised by
    per-channel statistics, which are buffers that training updates.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv3d(z, z, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.latents_mean, self.latents_variance, self.latents_count = map(Buffer, first_statistics(config))

    def posterior(self, video: Video, cache: CausalCache | None = None) -> Posterior:
        """Posterior over raw latents, float32.

        Args:
          video: pixels in [-1, 1], `b t h w 3`; t is 1 + n * temporal_factor, h and w are multiples of
            spatial_factor.
          cache: for a video in chunks: frame 0 alone, then n * temporal_factor frames per chunk.

        Raises:
          UserError: the VAE does not support the size of `video`.
        """
        frames, height, width = video.shape[1:4]
        self.config.latent_shape(
            frames if cache is None or cache.is_first_chunk else frames + 1, height, width
        )
        x = pixel_unshuffle(video.astype(self.config.dtype), self.config.patch_size)
        moments = self.quant_conv(self.encoder(x, cache)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def encode(self, video: Video, cache: CausalCache | None = None) -> Latents:
        """Normalised mean latents, float32, of a video in [-1, 1]."""
        return self.normalise(self.posterior(video, cache).mean)

    def decode(self, latents: Latents, cache: CausalCache | None = None) -> Video:
        """Video in [-1, 1], float32, not clipped, from normalised latents."""
        return self.decode_raw(self.denormalise(latents), cache)

    def decode_raw(self, latents: Latents, cache: CausalCache | None = None) -> Video:
        """Video in [-1, 1], float32, not clipped, from raw latents, such as `Posterior.sample` returns."""
        x = self.decoder(self.post_quant_conv(latents.astype(self.config.dtype)), cache)
        return pixel_shuffle(x, self.config.patch_size).astype(jnp.float32)

    def normalise(self, raw: Latents) -> Latents:
        mean, deviation = self._statistics()
        return (raw - mean) / deviation

    def denormalise(self, latents: Latents) -> Latents:
        mean, deviation = self._statistics()
        return latents * deviation + mean

    def update_statistics(self, raw: Latents) -> None:
        """Updates the running per-channel statistics with `raw`: cumulative at first, then exponential."""
        rate = jnp.maximum(1.0 / (self.latents_count[...] + 1.0), _MIN_RATE)
        mean = raw.mean((0, 1, 2, 3))
        shift = mean - self.latents_mean[...]
        variance = raw.var((0, 1, 2, 3)) + (1.0 - rate) * jnp.square(shift)
        self.latents_variance[...] += rate * (variance - self.latents_variance[...])
        self.latents_mean[...] += rate * shift
        self.latents_count[...] += 1.0

    def _statistics(self) -> tuple[Array, Array]:
        shape = (1, 1, 1, 1, -1)
        deviation = jnp.sqrt(self.latents_variance[...] + 1e-8)
        return self.latents_mean[...].reshape(shape), deviation.reshape(shape)
