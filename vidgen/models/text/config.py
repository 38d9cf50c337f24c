"""Options of the embedded text encoder."""

import dataclasses
from typing import Literal

from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """A small transformer over the bytes of the prompt, trained together with the video model.

    Attributes:
      dim: width of the features; the video model's `text_dim`.
      max_bytes: longest prompt in UTF-8 bytes.
      ngrams: lengths, in bytes, of the sequences that have embeddings of their own; () is none.
      ngram_rows: size of the table that they share, to which they are hashed.
    """

    dim: int = 192
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 768
    max_bytes: int = 192
    ngrams: tuple[int, ...] = (3, 4, 5, 6)
    ngram_rows: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if any(length < 2 for length in self.ngrams) or self.ngram_rows < 1:
            raise UserError(
                f"ngrams={self.ngrams} must be lengths of 2 or more, ngram_rows={self.ngram_rows} 1 or more"
            )
