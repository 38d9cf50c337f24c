"""Normalisation layers: computed in float32, returned in the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Float
from vidgen.nn.variables import ones, over_last_axis, param, zeros


def layer_norm(x: Float[Array, "*batch d"], eps: float = 1e-6) -> Float[Array, "*batch d"]:
    """Zero mean and unit variance over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm with a learned scale and bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, dim: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (dim,), (None,))
        self.bias = param(rngs, zeros, (dim,), (None,))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = layer_norm(x, self.eps)
        y = y * over_last_axis(self.scale[...], y) + over_last_axis(self.bias[...], y)
        return jnp.asarray(y, x.dtype)


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, with a learned scale (arXiv 1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (dim,), (None,))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return jnp.asarray(y * over_last_axis(self.scale[...], y), x.dtype)


class ChannelNorm(nnx.Module):
    """Scales each position's channel vector to length sqrt(c), times a learned scale, as in Wan's VAE.

    Unlike `RMSNorm`, it clamps the length to at least 1e-12 instead of adding an epsilon.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (channels,), (None,))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        y = x.astype(jnp.float32)
        square = jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24)
        y = y * jax.lax.rsqrt(square) * x.shape[-1] ** 0.5
        return jnp.asarray(y * over_last_axis(self.scale[...], y), x.dtype)
