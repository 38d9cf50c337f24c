"""Multi-head attention with RMS-normalised queries and keys."""

import functools

from flax import nnx

from vidgen.core.typing import Array, Float
from vidgen.nn.embeddings import apply_rope
from vidgen.nn.layers import Linear
from vidgen.nn.norms import RMSNorm
from vidgen.ops.attention import Implementation, attention
from vidgen.ops.key_ranges import KeyRanges
from vidgen.ops.norm_rope import norm_rope
from vidgen.ops.sequence_parallel import SequenceParallel, sequence_attention
from vidgen.parallel.rules import is_sharded


class MultiHeadAttention(nnx.Module):
    """Self-attention, or cross-attention to a context; q and k are normalised across all heads (Wan)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        second_context: bool = False,
        sequence: SequenceParallel | None = None,
        eps: float = 1e-6,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ):
        """Initialises the projections.

        Args:
          second_context: adds key and value projections for a second context. The same queries attend to it,
            and both outputs are summed.
          sequence: method of self-attention where the mesh shards tokens over `context`; None if tokens are
            never sharded.
        """
        self.num_heads = num_heads
        self.sequence = sequence
        self.implementation: Implementation = implementation
        self.query = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.key = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.value = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.out = Linear(dim, dim, axes=("heads", "embed"), rngs=rngs)
        self.query_norm = RMSNorm(dim, eps=eps, rngs=rngs)
        self.key_norm = RMSNorm(dim, eps=eps, rngs=rngs)
        project = lambda: Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)  # noqa: E731
        self.second_key = project() if second_context else None
        self.second_value = project() if second_context else None
        self.second_key_norm = RMSNorm(dim, eps=eps, rngs=rngs) if second_context else None

    def __call__(
        self,
        x: Float[Array, "b s d"],
        context: Float[Array, "b r d"] | None = None,
        *,
        angles: Float[Array, "#b s k2"] | None = None,
        ranges: KeyRanges | None = None,
        second: Float[Array, "b m d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Attends from `x` to `context` (default: to itself).

        Args:
          angles: rotary angles for self-attention, per example or shared by all.
          ranges: context tokens that each query sees, from `vidgen.ops.key_ranges`; None is all.
          second: tokens of the second context, all of them visible.
        """
        source = x if context is None else context
        query = self._normalised(self.query_norm, self.query(x), angles)
        key = self._normalised(self.key_norm, self.key(source), angles)
        value = self._heads(self.value(source))
        attend = functools.partial(attention, implementation=self.implementation)
        if context is None and self.sequence is not None and is_sharded("tokens"):
            y = sequence_attention(
                query, key, value, options=self.sequence, ranges=ranges, implementation=self.implementation
            )
        else:
            y = attend(query, key, value, ranges=ranges)
        if second is not None:
            assert self.second_key and self.second_value and self.second_key_norm
            key = self._heads(self.second_key_norm(self.second_key(second)))
            y = y + attend(query, key, self._heads(self.second_value(second)))
        return self.out(y.reshape(x.shape))

    def _normalised(self, norm: RMSNorm, x: Array, angles: Array | None) -> Array:
        """Splits `b s d` into normalised heads `b s n k`, rotated by `angles` if given."""
        if angles is None:
            return self._heads(norm(x))
        try:
            implementation = self.implementation
            return norm_rope(x, norm.scale[...], angles, eps=norm.eps, implementation=implementation)
        except NotImplementedError:
            return apply_rope(self._heads(norm(x)), angles)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)
