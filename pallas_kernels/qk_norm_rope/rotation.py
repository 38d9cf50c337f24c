"""Rotary angles as the kernel reads them: cosines and sines, computed once for all layers of a network."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["LANES", "Rotation", "cos_sin", "rotation"]

LANES = 128
"""Numbers side by side in a TPU's vector register."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotations of the pairs of a head, for each token.

    Attributes:
      table: float32, `#b s w`; w is `LANES`, or twice that for a `head_dim` above it. Cosines from column 0,
        sines from column w / 2, one per pair.
      head_dim: twice the number of pairs.
    """

    table: Array
    head_dim: int = dataclasses.field(metadata={"static": True})


def rotation(angles: Array) -> Rotation:
    """The table of angles, `#b s k2`; make it once, where the angles are made, and not in every layer.

    A cosine costs some forty operations, so that to compute one per pair in the kernel would take as long as
    all the rest of it; the table adds 512 bytes a token to the 4 per channel that the kernel moves anyhow.
    No gradient flows to the angles.
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
