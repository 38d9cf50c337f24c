"""Reference norm and RoPE in plain JAX: specifies the kernel's results, and the tests compare with it."""

import jax
import jax.numpy as jnp
from jax import Array

from .rotation import Rotation, cos_sin

__all__ = ["norm_rope"]


def norm_rope(
    x: Array, weight: Array, angles: Array | Rotation, *, eps: float = 1e-6, scale: float = 1.0
) -> Array:
    """RMS norm over all heads (arXiv 1910.07467), then RoPE on adjacent pairs (arXiv 2104.09864).

    Args:
      x: queries or keys, `b s (n k)` or `b s n k`.
      weight: weight of the norm, `(n k)`.
      angles: `#b s k2`, one per pair of a head's channels, or the table from `rotation`.
      eps: added to the mean square.
      scale: multiplies the result before it is rounded to the dtype of `x`.

    Returns:
      An array with the shape and dtype of `x`, computed in float32, or in float64 if `x` is float64.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (jax.lax.stop_gradient(part).astype(dtype)[:, :, None] for part in cos_sin(angles))
    y = x.astype(dtype).reshape(*x.shape[:2], -1)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * weight.astype(dtype)[None, None]
    pairs = y.reshape(*x.shape[:2], -1, cos.shape[-1], 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return (scale * rotated).reshape(x.shape).astype(x.dtype)
