"""Text-conditioned video model: one or two patch transformers, with a trained or an external text encoder."""

from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.streams import Stream
from vidgen.core.typing import Array, Bool, Int
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.model import DiT
from vidgen.models.text.model import ByteEncoder
from vidgen.models.video_vae.config import VAEConfig

__all__ = ["TextToVideo", "latent_shape"]


class TextToVideo(nnx.Module):
    """A transformer with its text encoder.

    Attributes:
      text: text encoder trained with the transformer; None if text features come from elsewhere.
      dit: the velocity function, a `Transformer`: one transformer, or Wan 2.2's two experts.
    """

    def __init__(self, dit: DiT | NoiseLevelExperts, text: ByteEncoder | None = None):
        if text is not None and dit.config.text_dim != text.config.dim:
            raise UserError(
                f"dit.text_dim={dit.config.text_dim} differs from text.dim={text.config.dim}: "
                "set them to the same width"
            )
        self.text = text
        self.dit = dit

    def encode_text(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Stream:
        """Encodes tokenized prompts; the model must have a text encoder."""
        assert self.text is not None
        return Stream(self.text(tokens, mask), mask)


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
