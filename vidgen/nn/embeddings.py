"""Timestep embedding and 3D rotary position embedding."""

import jax.numpy as jnp
import numpy as np

from vidgen.core.typing import Array, Float, Int


def timestep_embedding(
    timestep: Float[Array, "*batch"], dim: int, *, max_period: float = 10_000.0
) -> Float[Array, "*batch {dim}"]:
    """Cosines, then sines, of 1000 * timestep at geometrically spaced frequencies; float32.

    Args:
      timestep: in [0, 1], where 1 is pure noise.
      dim: width of the embedding, even.
    """
    half = dim // 2
    frequencies = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = (
        1000.0 * timestep.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * timestep.ndim + (half,))
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_positions(frames: int, height: int, width: int) -> Int[np.ndarray, "s 3"]:
    """(time, row, column) of each token of a grid; time varies slowest."""
    axes = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1).astype(np.int32)


def rope_angles(
    positions: Int[Array, "b s 3"] | Int[np.ndarray, "b s 3"], head_dim: int, *, theta: float = 10_000.0
) -> Float[Array, "b s k2"]:
    """Rotation angles of 3D RoPE, in radians: `head_dim / 2` per token.

    As in Wan, row and column get `head_dim // 6` channel pairs of a head each, and time gets the rest.
    """
    space = head_dim // 6
    pairs = (head_dim // 2 - 2 * space, space, space)
    angles = [
        jnp.asarray(positions[..., axis : axis + 1], jnp.float32)
        * jnp.asarray(theta ** -(np.arange(count) / count), jnp.float32)[None, None]
        for axis, count in enumerate(pairs)
    ]
    return jnp.concatenate(angles, axis=-1)


def apply_rope(x: Float[Array, "b s n k"], angles: Float[Array, "#b s k2"]) -> Float[Array, "b s n k"]:
    """Rotates adjacent channel pairs of each head by `angles`, in float32 (Su et al., arXiv 2104.09864)."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
