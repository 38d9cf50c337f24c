"""Text-conditioned video model: one or two patch transformers, with a trained or an external text encoder."""

import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Int, Latents
from vidgen.models.condition import Condition, PackedCondition, packed_condition, with_known
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.model import DiT, RunBlocks
from vidgen.models.text.model import ByteEncoder
from vidgen.models.video_vae.config import VAEConfig

__all__ = ["TextToVideo", "latent_shape"]


class TextToVideo(nnx.Module):
    """Predicts velocity from noisy latents, a timestep and a condition.

    Attributes:
      text: text encoder trained with the transformer; None if text features come from elsewhere.
      dit: the transformer, or Wan 2.2's two experts.
    """

    def __init__(self, dit: DiT | NoiseLevelExperts, text: ByteEncoder | None = None):
        if text is not None and dit.config.text_dim != text.config.dim:
            raise UserError(
                f"dit.text_dim={dit.config.text_dim} differs from text.dim={text.config.dim}: "
                "set them to the same width"
            )
        self.text = text
        self.dit = dit

    def condition(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Condition:
        """Encodes tokenized prompts; the model must have a text encoder."""
        assert self.text is not None
        return Condition(self.text(tokens, mask), mask)

    def velocity(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: Condition,
        run_blocks: RunBlocks | None = None,
    ) -> Latents:
        """Velocity, float32, on the grid of the latents; 0 at known latents.

        Args:
          run_blocks: replaces `DiT.apply_blocks`.
        """
        inputs, time_ids = with_known(latents, condition), None
        if condition.known_mask is not None:
            pt, ph, pw = self.dit.config.patch_size
            known_mask = condition.known_mask[:, ::pt, ::ph, ::pw].reshape(len(latents), -1)
            timestep = jnp.stack([timestep, jnp.zeros_like(timestep)], axis=1)
            time_ids = known_mask.astype(jnp.int32)
        if condition.concat_latents is not None:
            inputs = jnp.concatenate([inputs, condition.concat_latents], axis=-1)
        velocity = self.dit(
            inputs, timestep, condition.text, condition.mask, condition.image, run_blocks, time_ids
        )
        if condition.known_mask is None:
            return velocity
        # The loss masks out known latents, so the network's output there is arbitrary.
        return jnp.where(condition.known_mask[..., None], 0.0, velocity)

    def packed_condition(self, tokens: Int[Array, "b g l"], mask: Bool[Array, "b g l"]) -> PackedCondition:
        """Encodes the tokenized prompts of up to g clips per packed row, each prompt independently."""
        assert self.text is not None
        batch, clips, length = tokens.shape
        text = self.text(tokens.reshape(batch * clips, length), mask.reshape(batch * clips, length))
        return packed_condition(text.reshape(batch, clips, length, -1), mask)

    def packed_velocity(
        self,
        patches: Float[Array, "b s p"],
        timestep: Float[Array, "b g"],
        condition: PackedCondition,
        *,
        positions: Int[Array, "b s 3"],
        segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b s p"]:
        """Velocity of each token's patch, float32; equal to `velocity` of each clip alone.

        Args:
          patches: patches of noisy latents, in the order of `vidgen.models.dit.model.patchify`.
          timestep: timestep of each clip of a packed row.
          positions: time, row and column of each token on the grid of its clip.
          segment_ids: clip of each token, from 1 to g within its packed row; 0 is padding, at timestep 0.
        """
        assert isinstance(self.dit, DiT)
        return self.dit.tokens(
            patches,
            jnp.pad(timestep, ((0, 0), (1, 0))),
            condition.text,
            positions=positions,
            text_mask=condition.mask,
            segment_ids=(segment_ids, condition.segment_ids),
            time_ids=segment_ids,
        )


def latent_shape(vae: VAEConfig, dit: DiTConfig, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Shape (t, h, w, c) of a clip's latents.

    Args:
      size: frames, height and width of the clip.

    Raises:
      UserError: the VAE or the transformer does not support this size; names the nearest sizes that work.
    """
    for name, length, patch in zip(("height", "width"), size[1:], dit.patch_size[1:], strict=True):
        multiple = vae.spatial_factor * patch
        if length < 1 or length % multiple:
            lower = max(length // multiple, 0) * multiple
            options = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
            raise UserError(f"{name}={length} is not a multiple of {multiple}; use {options}")
    shape = vae.latent_shape(*size)
    dit.token_grid(*shape[:3])
    return shape
