"""Given frames as the transformer takes them."""

from typing import Literal

import jax
import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Latents, Video
from vidgen.models.dit.config import DiTConfig
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE

__all__ = ["FramesEnter", "beside_noise", "first_frame", "how_frames_enter"]

FramesEnter = Literal["beside", "first"]
"""Given frames are in channels beside the noise, or the first one is in its place with timestep 0."""


def how_frames_enter(dit: DiTConfig, latent_channels: int, temporal_factor: int) -> FramesEnter:
    """Which of the two a transformer is made for, by its channels.

    Raises:
      UserError: its channels are neither the latents' nor those of Wan's image to video.
    """
    extra = dit.in_channels - dit.velocity_channels
    if dit.velocity_channels == latent_channels:
        if extra == 0:
            return "first"
        if extra == temporal_factor + latent_channels:
            return "beside"
    raise UserError(
        f"the transformer takes {dit.in_channels} channels and gives {dit.velocity_channels}; with "
        f"{latent_channels} channels of latents expected are {latent_channels}, or "
        f"{2 * latent_channels + temporal_factor} and {latent_channels}"
    )


@jax.jit
def beside_noise(vae: VideoVAE, video: Video, is_given: Bool[Array, "t"]) -> Float[Array, "b tz hz wz x"]:
    """Channels beside the noise, as Wan's image to video takes them: a mask, and latents of what is given.

    Args:
      video: in [-1, 1]; frames that are not given are not looked at.
      is_given: which frames are.

    Returns:
      `temporal_factor` channels of the mask, one for each frame of a latent frame (the first frame stands for
      all of its own), then the latents, float32.
    """
    factor = vae.config.temporal_factor
    shown = jnp.where(is_given[None, :, None, None, None], video, 0.0)
    latents = streaming.encode(vae, shown)
    b, t, h, w, _ = latents.shape
    mask = jnp.concatenate([jnp.repeat(is_given[:1], factor), is_given[1:]]).reshape(t, factor)
    mask = jnp.broadcast_to(mask[None, :, None, None].astype(latents.dtype), (b, t, h, w, factor))
    return jnp.concatenate([mask, latents], axis=-1)


@jax.jit
def first_frame(vae: VideoVAE, image: Video, noise: Latents) -> tuple[Latents, Bool[Array, "b tz hz wz"]]:
    """Latents whose first frame is `image`, and where they are given; elsewhere they are zero.

    Args:
      image: in [-1, 1], one frame per clip.
      noise: of the clips; only its shape is looked at.
    """
    latents = vae.encode(image)
    given = jnp.zeros_like(noise).at[:, :1].set(latents)
    return given, jnp.zeros(noise.shape[:4], bool).at[:, 0].set(True)
