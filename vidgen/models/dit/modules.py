"""Blocks of the patch transformer, named after Wan's."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.streams import IMAGE, TEXT
from vidgen.core.typing import Array, Float, Int
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.streams import AttendedStream, GatedStreams, StreamEmbedder
from vidgen.nn.attention import MultiHeadAttention
from vidgen.nn.embeddings import timestep_embedding
from vidgen.nn.layers import FeedForward, Linear
from vidgen.nn.norms import LayerNorm, layer_norm
from vidgen.nn.variables import param, zeros
from vidgen.ops.key_ranges import KeyRanges
from vidgen.parallel.rules import constrain


def modulate(x: Float[Array, "b s d"], shift: Array, scale: Array, eps: float) -> Float[Array, "b s d"]:
    """Layer norm without weights, times 1 + scale plus shift, per token (`b s d`) or sequence (`b 1 d`)."""
    return (layer_norm(x, eps) * _over_tokens(1.0 + scale, x) + _over_tokens(shift, x)).astype(x.dtype)


def _over_tokens(vector: Float[Array, "b s2 d"], x: Float[Array, "b s d"]) -> Array:
    """A single vector broadcast to the shape of `x` (as `over_last_axis`, same dtype); others unchanged."""
    if vector.shape[:2] != (1, 1):
        return vector
    return jax.lax.broadcast_in_dim(vector[0, 0], x.shape, (2,))


def of_tokens(vectors: Float[Array, "b g d"], time_ids: Int[Array, "b s"] | None) -> Float[Array, "b s2 d"]:
    """Vector of each token, `vectors[b, time_ids[b, s]]`, exactly; `vectors` unchanged without `time_ids`.

    Index -1, padding, gives zeros.

    Computed as a matrix product with one-hot rows: it is sharded like other products over tokens, and its
    gradient, the sum over each vector's tokens, is a matrix product too.
    """
    if time_ids is None:
        return vectors
    chosen = jax.nn.one_hot(time_ids, vectors.shape[1], dtype=vectors.dtype)
    y = jnp.einsum("bsg,bgd->bsd", chosen, vectors, precision=jax.lax.Precision.HIGHEST)
    return constrain(y, "batch", "tokens", None)


class ConditionEmbedder(nnx.Module):
    """Maps timesteps to modulation vectors, and text and image features to the model's width."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.model_dim
        self.freq_dim = config.freq_dim
        self.time_1 = Linear(config.freq_dim, d, axes=("features", "embed"), rngs=rngs)
        self.time_2 = Linear(d, d, axes=("embed", "mlp"), rngs=rngs)
        # Zero: the gated branches of every block start at zero (adaLN-Zero; arXiv 2212.09748).
        self.time_proj = Linear(d, 6 * d, axes=("embed", "mlp"), init=zeros, rngs=rngs)
        self.text_1 = Linear(config.text_dim, d, axes=("features", "embed"), rngs=rngs)
        self.text_2 = Linear(d, d, axes=("embed", "mlp"), rngs=rngs)
        self.image = None if config.image_dim is None else ImageEmbedder(config, rngs=rngs)
        self.streams = StreamEmbedder(config, rngs=rngs) if config.streams else None

    def time(
        self, levels: Float[Array, "b k"], per_clip: Float[Array, "b c d"] | None = None
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b k 6 d"]]:
        """Embedding of each noise level and the six modulation vectors of a block, float32.

        Args:
          per_clip: added to the embeddings of each clip's levels; level i is of clip i modulo c.
        """
        hidden = self.time_1(timestep_embedding(levels, self.freq_dim))
        embedded = self.time_2(jax.nn.silu(hidden))
        if per_clip is not None:
            embedded = embedded + jnp.tile(per_clip, (1, levels.shape[1] // per_clip.shape[1], 1))
        embedded = constrain(embedded, "batch", None, None)
        modulation = constrain(self.time_proj(jax.nn.silu(embedded)), "batch", None, None)
        return embedded, modulation.reshape(*levels.shape, 6, -1)

    def text(self, features: Float[Array, "b l e"]) -> Float[Array, "b l d"]:
        hidden = constrain(jax.nn.gelu(self.text_1(features), approximate=True), "batch", None, None)
        return constrain(self.text_2(hidden), "batch", None, None)


class ImageEmbedder(nnx.Module):
    """Maps features of an image encoder to the model's width."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        assert config.image_dim is not None
        width = config.image_dim
        self.norm_in = LayerNorm(width, eps=1e-5, rngs=rngs)
        self.up = Linear(width, width, axes=("features", "mlp"), rngs=rngs)
        self.down = Linear(width, config.model_dim, axes=("mlp", "embed"), rngs=rngs)
        self.norm_out = LayerNorm(config.model_dim, eps=1e-5, rngs=rngs)
        shape = (config.image_positions, width)
        self.positions = param(rngs, zeros, shape, (None, None)) if config.image_positions else None

    def __call__(self, features: Float[Array, "i m g"]) -> Float[Array, "b m2 d"]:
        """Image tokens; with learned positions, two consecutive images are concatenated into one example."""
        if self.positions is not None:
            count, width = self.positions.shape
            features = features.reshape(-1, count, width) + self.positions[...][None].astype(features.dtype)
        hidden = jax.nn.gelu(self.up(self.norm_in(features)), approximate=False)
        return self.norm_out(self.down(hidden))


class Block(nnx.Module):
    """Self-attention, cross-attentions and feed-forward network; the timestep modulates first and last."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.model_dim
        self.eps = config.eps
        self.scale_shift_table = param(rngs, zeros, (6, d), (None, "embed"))
        make_attention = functools.partial(
            MultiHeadAttention,
            d,
            config.num_heads,
            eps=config.eps,
            implementation=config.attention,
            rngs=rngs,
        )
        self.self_attention = make_attention(sequence=config.sequence)
        self.cross_norm = LayerNorm(d, eps=config.eps, rngs=rngs)
        self.cross_attention = make_attention(second_context=config.image_dim is not None)
        self.gated = GatedStreams(config, rngs=rngs) if config.streams else None
        self.ffn = FeedForward(d, config.ffn_dim, kind=config.ffn, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        per_layer: None = None,
        *,
        modulation: Float[Array, "b k 6 d"],
        time_ids: Int[Array, "b s"] | None,
        angles: Float[Array, "#b s k2"],
        token_ranges: KeyRanges | None,
        streams: Mapping[str, AttendedStream],
    ) -> tuple[Float[Array, "b s d"], None]:
        """Tokens after this block, in the form of `apply` of `vidgen.nn.stack.apply_stack`.

        Args:
          per_layer: a block has no values of its own.
          modulation: modulation vectors of each noise level.
          time_ids: noise level of each token; None if there is one for all (k = 1).
          token_ranges: which tokens each token sees; None is all.
          streams: `text`, `image` for a model with an image encoder, and others that are attended to.
        """
        parts = jnp.split(modulation + self.scale_shift_table[...][None, None], 6, axis=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (of_tokens(part[:, :, 0], time_ids) for part in parts)
        y = modulate(x, shift1, scale1, self.eps)
        y = self.self_attention(y, angles=angles, ranges=token_ranges)
        x = x + (y * _over_tokens(gate1, y)).astype(x.dtype)
        text, image = streams[TEXT], streams.get(IMAGE)
        x = x + self.cross_attention(
            self.cross_norm(x), text.features, ranges=text.ranges, second=image and image.features
        )
        if self.gated is not None:
            x = self.gated(x, streams)
        y = self.ffn(modulate(x, shift2, scale2, self.eps))
        x = x + (y * _over_tokens(gate2, y)).astype(x.dtype)
        return constrain(x, "batch", "tokens", None), per_layer


class Head(nnx.Module):
    """Modulated norm and projection of each token to its velocity patch; zero at initialisation."""

    def __init__(self, config: DiTConfig, features: int, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale_shift_table = param(rngs, zeros, (2, config.model_dim), (None, "embed"))
        self.proj = Linear(config.model_dim, features, axes=("embed", "patch"), init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        embedded: Float[Array, "b g d"],
        time_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s p"]:
        """Velocity patch of each token; `time_ids` selects embedded timesteps as in `Block`."""
        parts = jnp.split(embedded[:, :, None] + self.scale_shift_table[...][None, None], 2, axis=2)
        shift, scale = (of_tokens(part[:, :, 0], time_ids) for part in parts)
        return self.proj(modulate(x, shift, scale, self.eps))
