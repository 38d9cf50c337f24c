"""Conversion between 8-bit pixels and pixels in [-1, 1]."""

import jax.numpy as jnp

from vidgen.core.typing import Array, Shaped, UInt8, Video


def to_float(video: UInt8[Array, "b t h w c"]) -> Video:
    """Converts 0..255 to [-1, 1], float32."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Shaped[Array, "b t h w c"]) -> UInt8[Array, "b t h w c"]:
    """Converts [-1, 1] to 0..255, rounded; clips values outside."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
