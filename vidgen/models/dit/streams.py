"""Modules for the streams of `DiTConfig.streams`; with initial weights they leave a transformer unchanged."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.streams import Streams
from vidgen.core.typing import Array, Float
from vidgen.models.dit.config import DiTConfig
from vidgen.nn.attention import MultiHeadAttention
from vidgen.nn.layers import Linear, xavier_uniform
from vidgen.nn.norms import LayerNorm
from vidgen.nn.variables import over_last_axis, param, zeros
from vidgen.ops.key_ranges import KeyRanges

__all__ = ["AttendedStream", "GatedStreams", "StreamEmbedder"]


class AttendedStream(NamedTuple):
    """Keys of a cross-attention, in the model's width.

    Attributes:
      ranges: which of them each token sees; None is all.
    """

    features: Float[Array, "b r d"]
    ranges: KeyRanges | None


class StreamEmbedder(nnx.Module):
    """Projects each stream to the model's width."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.projections = nnx.Dict(
            {
                stream.name: Linear(
                    stream.dim,
                    config.model_dim,
                    axes=("features", "embed"),
                    # The gate of a cross-attention is zero, so that its projection need not be.
                    init=xavier_uniform if stream.enters == "cross" else zeros,
                    rngs=rngs,
                )
                for stream in config.streams
            }
        )

    def attended(self, streams: Streams) -> dict[str, Float[Array, "b r d"]]:
        """Features of the streams that enter by cross-attention."""
        return {name: self._projected(name, streams) for name in self._of("cross")}

    def per_token(self, streams: Streams) -> Float[Array, "b s d"] | float:
        """Sum of the streams that are added to the tokens."""
        return sum((self._projected(name, streams) for name in self._of("token")), start=0.0)

    def per_clip(self, streams: Streams, clips: int) -> Float[Array, "b c d"] | None:
        """Sum of the streams that modulate, for each of up to `clips` clips of a sequence; float32.

        Raises:
          UserError: a stream has another number of features than one per clip.
        """
        total = None
        for name in self._of("modulation"):
            found = streams[name].features.shape[1]
            if found not in (1, clips):
                raise UserError(
                    f"the stream {name!r} has {found} features per sequence, and modulates {clips} clips: "
                    "give one per clip"
                )
            part = self._projected(name, streams).astype(jnp.float32)
            total = part if total is None else total + part
        return total

    def _of(self, enters: str) -> list[str]:
        return [stream.name for stream in self.config.streams if stream.enters == enters]

    def _projected(self, name: str, streams: Streams) -> Array:
        return self.projections[name](streams[name].features.astype(self.config.dtype))


class GatedStreams(nnx.Module):
    """Cross-attention of a block to each stream, times tanh of learned gates (arXiv 2204.14198)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        names = [stream.name for stream in config.streams if stream.enters == "cross"]
        d = config.model_dim
        attention = lambda: MultiHeadAttention(  # noqa: E731
            d, config.num_heads, eps=config.eps, implementation=config.attention, rngs=rngs
        )
        self.norms = nnx.Dict({name: LayerNorm(d, eps=config.eps, rngs=rngs) for name in names})
        self.attentions = nnx.Dict({name: attention() for name in names})
        self.gates = nnx.Dict({name: param(rngs, zeros, (d,), (None,)) for name in names})

    def __call__(
        self, x: Float[Array, "b s d"], streams: Mapping[str, AttendedStream]
    ) -> Float[Array, "b s d"]:
        """Tokens plus the gated attention to each stream."""
        for name, attention in self.attentions.items():
            features, ranges = streams[name]
            y = attention(self.norms[name](x), features, ranges=ranges)
            x = x + (y * jnp.tanh(over_last_axis(self.gates[name][...], y))).astype(x.dtype)
        return x
