"""A patch transformer, or two, under text: with a text encoder of its own, or given features of one."""

import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Int, Latents
from vidgen.models.condition import Condition, with_given
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.experts import TwoExperts
from vidgen.models.dit.model import DiT
from vidgen.models.text.model import ByteEncoder
from vidgen.models.video_vae.config import VAEConfig

__all__ = ["TextToVideo", "latent_shape"]


class TextToVideo(nnx.Module):
    """Predicts velocity from noisy latents, a timestep and a condition.

    Attributes:
      text: the encoder of prompts that is trained with the transformer, if there is one.
      dit: the transformer, or Wan 2.2's two.
    """

    def __init__(self, dit: DiT | TwoExperts, text: ByteEncoder | None = None):
        if text is not None and dit.config.text_dim != text.config.dim:
            raise ValueError(
                f"dit.text_dim={dit.config.text_dim} differs from text.dim={text.config.dim}: "
                "set them to the same width"
            )
        self.text = text
        self.dit = dit

    def condition(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Condition:
        """Encodes tokenized prompts, for a model with a text encoder."""
        assert self.text is not None
        return Condition(self.text(tokens, mask), mask)

    def velocity(self, latents: Latents, timestep: Float[Array, "b"], condition: Condition) -> Latents:
        """Velocity of what is not given, float32; as many frames, rows and columns as the latents."""
        inputs = with_given(latents, condition)
        if condition.is_given is not None:
            pt, ph, pw = self.dit.config.patch_size
            is_given = condition.is_given[:, ::pt, ::ph, ::pw].reshape(len(latents), -1)
            timestep = jnp.where(is_given, 0.0, timestep[:, None])
        if condition.beside is not None:
            inputs = jnp.concatenate([inputs, condition.beside], axis=-1)
        return self.dit(inputs, timestep, condition.text, condition.mask, condition.image)


def latent_shape(vae: VAEConfig, dit: DiTConfig, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Shape (t, h, w, c) of a clip's latents.

    Args:
      size: frames, height and width of the clip.

    Raises:
      ValueError: the clip's size is not one that both take; names the nearest sizes that are.
    """
    for name, length, patch in zip(("height", "width"), size[1:], dit.patch_size[1:], strict=True):
        multiple = vae.spatial_factor * patch
        if length < 1 or length % multiple:
            lower = max(length // multiple, 0) * multiple
            options = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
            raise ValueError(f"{name}={length} is not a multiple of {multiple}; use {options}")
    shape = vae.latent_shape(*size)
    dit.token_grid(*shape[:3])
    return shape
