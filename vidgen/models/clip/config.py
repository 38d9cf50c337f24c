"""Options of CLIP's image encoder, and its named variants."""

import dataclasses
from typing import Literal

from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The vision transformer of CLIP (arXiv 2103.00020).

    Attributes:
      image_size: height and width of the images, in pixels.
      patch_size: height and width of the patch of a token, in pixels.
      activation: activation of the feed-forward networks; `quick_gelu` is x * sigmoid(1.702 x).
      dtype: compute dtype of matrix products; norms and softmax are float32.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ffn_dim: int = 5120
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    eps: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise UserError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size={self.patch_size} is larger than image_size={self.image_size}")

    @property
    def num_tokens(self) -> int:
        """Tokens per image: one class token and one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


VARIANTS: dict[str, CLIPVisionConfig] = {"vit-h-14": CLIPVisionConfig()}
"""Shapes by name: the encoder of Wan 2.1's image to video."""
