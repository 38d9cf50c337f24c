"""The T5 and UMT5 encoder: token ids to text features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.t5.config import T5Config
from vidgen.nn.layers import Linear
from vidgen.nn.norms import RMSNorm
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.nn.variables import param
from vidgen.ops.attention import attention
from vidgen.ops.key_ranges import KeyRanges, self_attention_ranges
from vidgen.parallel.rules import constrain

_normal = jax.nn.initializers.normal(1.0)


def _table_of_biases(config: T5Config, rngs: nnx.Rngs) -> nnx.Param:
    return param(rngs, _normal, (config.num_buckets, config.num_heads), (None, "heads"))


class SelfAttention(nnx.Module):
    """Unscaled attention with a learned relative position bias, and no other position encoding."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        dim, inner = config.dim, config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.query = Linear(dim, inner, axes=("embed", "heads"), use_bias=False, rngs=rngs)
        self.key = Linear(dim, inner, axes=("embed", "heads"), use_bias=False, rngs=rngs)
        self.value = Linear(dim, inner, axes=("embed", "heads"), use_bias=False, rngs=rngs)
        self.out = Linear(inner, dim, axes=("heads", "embed"), use_bias=False, rngs=rngs)
        self.position_bias = None if config.shared_bias else _table_of_biases(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        ranges: KeyRanges | None,
        buckets: Int[Array, "l l"],
        position_bias: Float[Array, "p n"] | None,
    ) -> Float[Array, "b l d"]:
        table = position_bias if self.position_bias is None else self.position_bias[...]
        assert table is not None
        query, key, value = (
            project(x).reshape(*x.shape[:2], self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        bias = jnp.transpose(table[buckets], (2, 0, 1))[None]
        y = attention(query, key, value, ranges=ranges, bias=bias, scale=1.0)
        return self.out(y.reshape(*x.shape[:2], -1))


class GatedFeedForward(nnx.Module):
    """GELU-gated feed-forward network (tanh form), without biases."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        dim, hidden = config.dim, config.ffn_dim
        self.gate = Linear(dim, hidden, axes=("embed", "mlp"), use_bias=False, rngs=rngs)
        self.up = Linear(dim, hidden, axes=("embed", "mlp"), use_bias=False, rngs=rngs)
        self.down = Linear(hidden, dim, axes=("mlp", "embed"), use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and feed-forward network."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, eps=config.eps, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, eps=config.eps, rngs=rngs)
        self.ffn = GatedFeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        ranges: KeyRanges | None,
        buckets: Int[Array, "l l"],
        position_bias: Float[Array, "p n"] | None,
    ) -> Float[Array, "b l d"]:
        y = self.attention(
            self.attention_norm(x), ranges=ranges, buckets=buckets, position_bias=position_bias
        )
        x = x + y
        return x + self.ffn(self.ffn_norm(x))


class T5Encoder(nnx.Module):
    """Maps token ids to features."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = param(rngs, _normal, (config.vocab_size, config.dim), ("vocab", "embed"))
        self.position_bias = _table_of_biases(config, rngs) if config.shared_bias else None
        self.layers = make_stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of each token; meaningless where `mask` is False.

        Args:
          mask: true for tokens of the prompt, at least one per example.
        """
        config = self.config
        x = constrain(self.embedding[...][tokens].astype(config.dtype), "batch", None, None)
        buckets = relative_buckets(tokens.shape[1], config.num_buckets, config.max_distance)
        x, _ = apply_stack(
            self.layers,
            x,
            _apply_layer,
            ranges=self_attention_ranges(key_mask=mask),
            buckets=jnp.asarray(buckets),
            position_bias=None if self.position_bias is None else self.position_bias[...],
        )
        return self.norm(x)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "l l"]:
    """Bucket of the relative position (key - query) of each query and key.

    The second half of the buckets is for keys after the query. In each half, the first half of the buckets
    holds one distance each, from 0 on; the rest cover logarithmically growing ranges up to `max_distance`,
    and the last bucket also holds all larger distances.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    scale = (half - exact) / np.log(max_distance / exact)
    far = exact + (np.log(np.maximum(distance, 1).astype(np.float32) / exact) * scale).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


def _apply_layer(layer: EncoderLayer, x: Array, _: None, **conditions: Any) -> tuple[Array, None]:
    return constrain(layer(x, **conditions), "batch", None, None), None
