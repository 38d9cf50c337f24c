"""Array types and the shape aliases used in signatures.

Axis letters: `b` batch, `t` frames, `h` height, `w` width, `c` channels, `s` tokens, `n` heads, `k` head dim,
`d` model dim, `f` feed-forward dim, `l` text tokens.
"""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt8, UInt32

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Latents",
    "Metrics",
    "Noisy",
    "PyTree",
    "RGBClip",
    "Shaped",
    "UInt8",
    "UInt32",
    "Video",
]

Video: TypeAlias = Float[Array, "b t h w c"]
"""Pixels in [-1, 1]."""

Latents: TypeAlias = Float[Array, "b tz hz wz z"]
"""Latents on a coarser grid than pixels, normalised to zero mean and unit variance per channel."""

Noisy: TypeAlias = Float[Array, "b *rest"]
"""Latents of each clip in any form: as sequences of patches, or on their grid."""

RGBClip: TypeAlias = UInt8[np.ndarray, "t h w 3"]
"""A clip on the host: 8-bit RGB frames."""

Metrics: TypeAlias = dict[str, Any]
"""Scalars by name."""
