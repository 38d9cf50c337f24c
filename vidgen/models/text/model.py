"""The byte-level text encoder."""

import jax
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.tokenizer import VOCABULARY
from vidgen.nn.attention import MultiHeadAttention
from vidgen.nn.layers import FeedForward
from vidgen.nn.norms import RMSNorm
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.nn.variables import param
from vidgen.parallel.rules import constrain

_normal = jax.nn.initializers.normal(0.02)


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and a gated feed-forward network."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, rngs=rngs)
        self.attention = MultiHeadAttention(config.dim, config.num_heads, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, rngs=rngs)
        self.ffn = FeedForward(config.dim, config.ffn_dim, kind="swiglu", rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], *, mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        x = x + self.attention(self.attention_norm(x), key_mask=mask)
        return x + self.ffn(self.ffn_norm(x))


class ByteEncoder(nnx.Module):
    """Features of a prompt from its bytes; learned positions, attention in both directions."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = param(rngs, _normal, (VOCABULARY, config.dim), ("vocab", "embed"))
        self.positions = param(rngs, _normal, (config.max_bytes + 1, config.dim), (None, "embed"))
        self.layers = make_stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of each token; those where `mask` is False are meaningless.

        Args:
          tokens: of `tokenize`; l may be shorter than max_bytes + 1.
        """
        x = self.embedding[...][tokens] + self.positions[...][None, : tokens.shape[1]]
        x = constrain(x.astype(self.config.dtype), "batch", None, None)
        return self.norm(apply_stack(self.layers, x, _apply_layer, mask=mask))


def _apply_layer(layer: EncoderLayer, x: Array, mask: Array) -> Array:
    return constrain(layer(x, mask=mask), "batch", None, None)
