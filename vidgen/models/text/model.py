"""The byte-level text encoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.tokenizer import PADDING, VOCABULARY
from vidgen.nn.attention import MultiHeadAttention
from vidgen.nn.embeddings import grid_positions, rope_angles
from vidgen.nn.layers import FeedForward
from vidgen.nn.norms import RMSNorm
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.nn.variables import param
from vidgen.ops.key_ranges import KeyRanges, self_attention_ranges
from vidgen.parallel.rules import constrain

_normal = jax.nn.initializers.normal(1.0)
_PRIME, _MIX = 0x01000193, 0x9E3779B1  # Multipliers of FNV and Fibonacci hashing.


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and gated feed-forward network."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, rngs=rngs)
        self.attention = MultiHeadAttention(config.dim, config.num_heads, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, rngs=rngs)
        self.ffn = FeedForward(config.dim, config.ffn_dim, kind="swiglu", rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], *, ranges: KeyRanges | None, angles: Float[Array, "#b l k2"]
    ) -> Float[Array, "b l d"]:
        x = x + self.attention(self.attention_norm(x), ranges=ranges, angles=angles)
        return x + self.ffn(self.ffn_norm(x))


class ByteEncoder(nnx.Module):
    """Bidirectional transformer over a prompt's bytes, each embedded with the n-grams that end at it.

    Hashed n-gram embeddings (as in BLT, arXiv 2412.09871) give words features before the first layer; from
    bytes alone, the layers would have to assemble them.
    """

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = param(rngs, _normal, (VOCABULARY, config.dim), ("vocab", "embed"))
        self.ngram_embedding = (
            param(rngs, _normal, (config.ngram_rows, config.dim), ("vocab", "embed"))
            if config.ngrams
            else None
        )
        self.layers = make_stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of each token; meaningless where `mask` is False.

        Args:
          tokens: token ids from `tokenize`.
        """
        config = self.config
        x = self.embedding[...][tokens]
        if self.ngram_embedding is not None:
            ngram_ids = jnp.stack([hash_ngrams(tokens, n, config.ngram_rows) for n in config.ngrams])
            x = (x + self.ngram_embedding[...][ngram_ids].sum(0)) * (1 + len(config.ngrams)) ** -0.5
        x = constrain(x.astype(config.dtype), "batch", None, None)
        angles = rope_angles(grid_positions(tokens.shape[1], 1, 1)[None], config.dim // config.num_heads)
        ranges = self_attention_ranges(key_mask=mask)
        x, _ = apply_stack(self.layers, x, _apply_layer, ranges=ranges, angles=angles)
        return self.norm(x)


def hash_ngrams(tokens: Int[Array, "b l"], length: int, rows: int) -> Int[Array, "b l"]:
    """Hash in [0, rows) of the `length` tokens that end at each position, with padding before the first."""
    padded = jnp.pad(tokens, ((0, 0), (length - 1, 0)), constant_values=PADDING).astype(jnp.uint32)
    code = jnp.full(tokens.shape, length, jnp.uint32)
    for offset in range(length):
        code = code * jnp.uint32(_PRIME) + padded[:, offset : offset + tokens.shape[1]]
    # A product mixes its high bits best, but the remainder depends on the low bits: fold them together.
    code = code * jnp.uint32(_MIX)
    return ((code ^ (code >> 16)) % jnp.uint32(rows)).astype(jnp.int32)


def _apply_layer(layer: EncoderLayer, x: Array, _: None, **conditions: Any) -> tuple[Array, None]:
    return constrain(layer(x, **conditions), "batch", None, None), None
