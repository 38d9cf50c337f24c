"""The causal video autoencoder: pixels to normalised latents and back, images being one-frame videos."""

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

_SLOWEST = 0.01
"""Least rate at which latent statistics follow a batch."""


class Posterior(NamedTuple):
    """A diagonal Gaussian over raw (not normalised) latents."""

    mean: Float[Array, "b t h w c"]
    log_variance: Float[Array, "b t h w c"]

    def sample(self, key: Array) -> Float[Array, "b t h w c"]:
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> Float[Array, ""]:
        """Divergence from the standard normal, in nats, mean over latent elements."""
        variance = jnp.exp(self.log_variance)
        return 0.5 * (jnp.square(self.mean) + variance - 1.0 - self.log_variance).mean()


class Encoder(nnx.Module):
    """Pixels to the posterior's mean and log variance, one above the other in channels."""

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
    """Raw latents to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        mults = config.dim_mult[::-1]
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        dims = [base * mult for mult in (mults[0], *mults)]
        self.remat = config.remat
        self.conv_in = CausalConv3d(config.latent_channels, dims[0], (3, 3, 3), rngs=rngs)
        self.mid_block = MidBlock(dims[0], rngs=rngs)
        # Without shortcuts each step up halves the channels that the next level takes.
        bf16_pattern = [dims[0], *(dim if config.level_shortcuts else dim // 2 for dim in dims[1:])]
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
                bf16_pattern, dims[1:], _steps(config.temporal_downsample[::-1]), strict=False
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
    """What follows each level; the last has no step."""
    return [*(Step(flag) for flag in temporal), None]


def _run(blocks: list, x: Array, cache: CausalCache | None, *, remat: bool) -> Array:
    for block in blocks:
        # A cache is written to, which a recomputed function must not do; nothing is trained with one.
        if remat and cache is None:
            x = jax.checkpoint(lambda block, x: block(x))(block, x)
        else:
            x = block(x, cache)
    return x


def first_statistics(config: VAEConfig) -> tuple[Array, Array, Array]:
    """Mean and variance of each latent channel at the start, and how many batches they count for."""
    z = config.latent_channels
    mean = jnp.asarray(config.latents_mean or (0.0,) * z, jnp.float32)
    deviation = jnp.asarray(config.latents_std or (1.0,) * z, jnp.float32)
    return mean, jnp.square(deviation), jnp.asarray(1.0 / _SLOWEST if config.latents_mean else 0.0)


class VideoVAE(nnx.Module):
    """KL autoencoder, causal in time: frame 0 is a latent frame, then each group of frames becomes one.

    A latent frame depends on no later frame of the video. Latents handed out are normalised by the
    per-channel statistics that are kept as buffers and updated in training.
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
        """Distribution over raw latents, in float32.

        Args:
          video: pixels in [-1, 1], `b t h w 3`; t is 1 + n * temporal_factor, h and w multiples of
            spatial_factor.
          cache: `video` is a group of frames of a longer one: frame 0 alone, then n * temporal_factor each.

        Raises:
          UserError: the size is not one that the VAE takes.
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
        """Normalised mean latents of a video in [-1, 1]; float32."""
        return self.normalise(self.posterior(video, cache).mean)

    def decode(self, latents: Latents, cache: CausalCache | None = None) -> Video:
        """Video in [-1, 1] (float32, not clipped) of normalised latents."""
        return self.decode_raw(self.denormalise(latents), cache)

    def decode_raw(self, latents: Latents, cache: CausalCache | None = None) -> Video:
        """Video of raw latents, as sampled from a `Posterior`."""
        x = self.decoder(self.post_quant_conv(latents.astype(self.config.dtype)), cache)
        return pixel_shuffle(x, self.config.patch_size).astype(jnp.float32)

    def normalise(self, raw: Latents) -> Latents:
        mean, deviation = self._statistics()
        return (raw - mean) / deviation

    def denormalise(self, latents: Latents) -> Latents:
        mean, deviation = self._statistics()
        return latents * deviation + mean

    def update_statistics(self, raw: Latents) -> None:
        """Moves the per-channel mean and variance towards those of `raw`: an average, then exponential."""
        rate = jnp.maximum(1.0 / (self.latents_count[...] + 1.0), _SLOWEST)
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
