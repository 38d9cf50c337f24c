"""Image conditioning: known frames as concatenated channels, or as known latents."""

from typing import Literal

import jax
import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Latents, Video
from vidgen.models.dit.config import DiTConfig
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE

__all__ = ["ImageConditioning", "concat_condition", "first_frame", "infer_image_conditioning"]

ImageConditioning = Literal["beside", "first"]
"""`beside`: channels of the known frames are concatenated. `first`: the first latent frame is known."""


def infer_image_conditioning(dit: DiTConfig, latent_channels: int, temporal_factor: int) -> ImageConditioning:
    """Infers a transformer's image conditioning from its numbers of channels.

    Raises:
      UserError: the channels fit neither the latents nor Wan's image-to-video input.
    """
    extra = dit.in_channels - dit.velocity_channels
    if dit.velocity_channels == latent_channels:
        if extra == 0:
            return "first"
        if extra == temporal_factor + latent_channels:
            return "beside"
    raise UserError(
        f"the transformer takes {dit.in_channels} channels and gives {dit.velocity_channels}; for latents "
        f"of {latent_channels} channels it must take {latent_channels} or "
        f"{2 * latent_channels + temporal_factor}, and give {latent_channels}"
    )


@jax.jit
def concat_condition(
    vae: VideoVAE, video: Video, known_mask: Bool[Array, "t"]
) -> Float[Array, "b tz hz wz x"]:
    """Channels that Wan's image-to-video models concatenate to the noise: a mask and latents of known frames.

    Args:
      video: in [-1, 1]; unknown frames are replaced by 0 (grey).
      known_mask: true for known frames.

    Returns:
      `temporal_factor` mask channels, one per frame of a latent frame (the first frame fills all channels of
      the first latent frame), then the channels of the latents, float32.
    """
    factor = vae.config.temporal_factor
    shown = jnp.where(known_mask[None, :, None, None, None], video, 0.0)
    latents = streaming.encode(vae, shown)
    b, t, h, w, _ = latents.shape
    mask = jnp.concatenate([jnp.repeat(known_mask[:1], factor), known_mask[1:]]).reshape(t, factor)
    mask = jnp.broadcast_to(mask[None, :, None, None].astype(latents.dtype), (b, t, h, w, factor))
    return jnp.concatenate([mask, latents], axis=-1)


@jax.jit
def first_frame(vae: VideoVAE, image: Video, noise: Latents) -> tuple[Latents, Bool[Array, "b tz hz wz"]]:
    """Known latents, zero except the first latent frame, and their mask.

    Args:
      image: in [-1, 1], one frame per clip.
      noise: has the shape of the result.
    """
    latents = vae.encode(image)
    known_latents = jnp.zeros_like(noise).at[:, :1].set(latents)
    return known_latents, jnp.zeros(noise.shape[:4], bool).at[:, 0].set(True)
