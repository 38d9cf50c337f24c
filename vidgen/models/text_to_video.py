"""A text encoder and a patch transformer trained together."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Int, Latents
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.video_vae.config import VAEConfig


class Condition(NamedTuple):
    """What the transformer is told besides latents and timestep; a pytree with the batch first."""

    text: Float[Array, "b l e"]
    mask: Bool[Array, "b l"]


class PackedCondition(NamedTuple):
    """The prompts of rows of several clips, one after the other; a pytree with the batch first.

    `segment_ids` says which clip of its row, from 1 on, each text token is for.
    """

    text: Float[Array, "b r e"]
    mask: Bool[Array, "b r"]
    segment_ids: Int[Array, "b r"]


class TextToVideo(nnx.Module):
    """Predicts velocity from noisy latents, a timestep and a prompt."""

    def __init__(self, dit: DiTConfig, text: ByteEncoderConfig, *, rngs: nnx.Rngs):
        if dit.text_dim != text.dim:
            raise ValueError(
                f"dit.text_dim={dit.text_dim} differs from text.dim={text.dim}: set them to the same width"
            )
        self.text = ByteEncoder(text, rngs=rngs)
        self.dit = DiT(dit, rngs=rngs)

    def condition(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Condition:
        """Encodes tokenized prompts."""
        return Condition(self.text(tokens, mask), mask)

    def velocity(self, latents: Latents, timestep: Float[Array, "b"], condition: Condition) -> Latents:
        """Velocity, shaped as the latents, float32."""
        return self.dit(latents, timestep, condition.text, condition.mask)

    def packed_condition(self, tokens: Int[Array, "b g l"], mask: Bool[Array, "b g l"]) -> PackedCondition:
        """Encodes the tokenized prompts of up to g clips per row, each by itself."""
        rows, clips, length = tokens.shape
        text = self.text(tokens.reshape(rows * clips, length), mask.reshape(rows * clips, length))
        owner = jnp.broadcast_to(jnp.arange(1, clips + 1)[None, :, None], tokens.shape)
        return PackedCondition(
            text.reshape(rows, clips * length, -1), mask.reshape(rows, -1), owner.reshape(rows, -1)
        )

    def packed_velocity(
        self,
        patches: Float[Array, "b s p"],
        timestep: Float[Array, "b s"],
        condition: PackedCondition,
        *,
        positions: Int[Array, "b s 3"],
        segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b s p"]:
        """Velocity of each token's patch, float32; a clip's is what `velocity` gives for the clip alone.

        Args:
          patches: of noisy latents, as `vidgen.models.dit.model.patchify` orders them.
          timestep: of each token.
          positions: time, row and column of each token on the grid of its clip.
          segment_ids: which clip of its row each token belongs to, from 1 on; 0 is padding.
        """
        return self.dit.tokens(
            patches,
            timestep,
            condition.text,
            positions=positions,
            text_mask=condition.mask,
            segment_ids=(segment_ids, condition.segment_ids),
        )


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
