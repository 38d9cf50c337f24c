"""RoPE table that the kernel reads: cosines and sines, computed once for all layers of a network."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["LANES", "Rotation", "cos_sin", "rotation"]

LANES = 128
"""Lanes of a TPU vector register."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotations of a head's channel pairs, for each token.

    Attributes:
      table: float32, `#b s w`; w is `LANES`, or 2 `LANES` if `head_dim` exceeds `LANES`. Cosines start at
        column 0, sines at column w / 2, one per pair.
      head_dim: channels of a head, twice the number of pairs.
    """

    table: Array
    head_dim: int = dataclasses.field(metadata={"static": True})


def rotation(angles: Array) -> Rotation:
    """The table for angles `#b s k2`; compute it once with the angles, not in every layer.

    A cosine takes about forty operations: one per pair in the kernel would take as long as everything else in
    it. The table adds 512 bytes per token to the 4 bytes per channel that the kernel transfers anyway. No
    gradient flows to the angles.
    """
    pairs = angles.shape[-1]
    half = LANES // 2 if 2 * pairs <= LANES else LANES
    angles = jax.lax.stop_gradient(angles).astype(jnp.float32)
    padding = ((0, 0), (0, 0), (0, max(half - pairs, 0)))
    parts = [jnp.pad(f(angles), padding) for f in (jnp.cos, jnp.sin)]
    return Rotation(table=jnp.concatenate(parts, axis=-1), head_dim=2 * pairs)


def cos_sin(angles: Array | Rotation) -> tuple[Array, Array]:
    """Cosines and sines, `#b s k2`."""
    if not isinstance(angles, Rotation):
        return jnp.cos(angles), jnp.sin(angles)
    pairs, half = angles.head_dim // 2, angles.table.shape[-1] // 2
    return angles.table[..., :pairs], angles.table[..., half : half + pairs]
