"""A text encoder and a patch transformer trained together."""

from typing import NamedTuple

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
