"""Options of the byte-level text encoder."""

import dataclasses
from typing import Annotated, Literal

from vidgen.core import limits
from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """A small transformer over the bytes of the prompt, trained together with the video model.

    Attributes:
      dim: width of the features; equals the video model's `text_dim`.
      max_bytes: longest prompt, in UTF-8 bytes.
      ngrams: lengths, in bytes, of the n-grams with hashed embeddings; () is none.
      ngram_rows: size of the embedding table that n-grams of all lengths are hashed into.
    """

    dim: Annotated[int, limits.WIDTH] = 192
    num_layers: Annotated[int, limits.LAYERS] = 4
    num_heads: Annotated[int, limits.HEADS] = 4
    ffn_dim: Annotated[int, limits.WIDTH] = 768
    max_bytes: Annotated[int, limits.TOKENS] = 192
    ngrams: tuple[int, ...] = (3, 4, 5, 6)
    ngram_rows: Annotated[int, limits.VOCABULARY] = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise UserError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if any(length < 2 for length in self.ngrams) or self.ngram_rows < 1:
            raise UserError(
                f"ngrams={self.ngrams} must be lengths of 2 or more, ngram_rows={self.ngram_rows} 1 or more"
            )
