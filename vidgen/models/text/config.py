"""Options of the embedded text encoder."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """A small transformer over the bytes of the prompt, trained together with the video model.

    Attributes:
      dim: width of the features; the video model's `text_dim`.
      max_bytes: longest prompt in UTF-8 bytes.
    """

    dim: int = 192
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 768
    max_bytes: int = 192
    dtype: Literal["float32", "bfloat16"] = "float32"
