"""Options of the T5 encoder, and its named variants."""

import dataclasses
from typing import Literal

from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202) or UMT5 (arXiv 2304.09151).

    Attributes:
      vocab_size: number of token embeddings.
      head_dim: width of a head; `num_heads * head_dim` may differ from `dim`.
      num_buckets: buckets of relative positions, each with a learned bias.
      max_distance: distance, in tokens, from which on all positions share the last bucket.
      shared_bias: all layers share the position biases of the first (T5); otherwise each has separate ones
        (UMT5).
      dtype: compute dtype of matrix products; norms, biases and softmax are float32.
    """

    vocab_size: int = 256_384
    dim: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10_240
    num_buckets: int = 32
    max_distance: int = 128
    shared_bias: bool = False
    eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.max_distance <= self.num_buckets // 4:
            raise UserError(
                f"max_distance={self.max_distance} must be larger than a quarter of the "
                f"num_buckets={self.num_buckets}"
            )


VARIANTS: dict[str, T5Config] = {
    "umt5-xxl": T5Config(),
    "t5-v1.1-xxl": T5Config(vocab_size=32_128, shared_bias=True),
}
"""Shapes by name: the text encoders of Wan (`umt5-xxl`), and of LTX-Video and others (`t5-v1.1-xxl`)."""
