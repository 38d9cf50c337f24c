"""LPIPS: perceptual distance of images, computed from VGG16 features.

Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv:1801.03924),
with the linear heads of version 0.1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float
from vidgen.nn.variables import over_last_axis, param, zeros
from vidgen.ops.convolution import conv3d

__all__ = ["LPIPS", "SMALLEST_SIDE"]

SMALLEST_SIDE = 16
"""Smallest height and width, in pixels: the last features have 1/16 of the image's height and width."""

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions by stage (arXiv:1409.1556, table 1, column D)."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet's RGB channels, for pixels in [-1, 1]."""

_EPSILON = 1e-10

_he_normal = jax.nn.initializers.he_normal()


class Conv(nnx.Module):
    """3 x 3 convolution of each frame, and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        shape = (1, 3, 3, in_channels, out_channels)
        self.kernel = param(rngs, _he_normal, shape, (None, None, None, "conv_in", "conv_out"))
        self.bias = param(rngs, zeros, (out_channels,), ("conv_out",))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        y = conv3d(x, self.kernel[...], padding=((0, 0), (1, 1), (1, 1)))
        return jax.nn.relu(y + over_last_axis(self.bias[...], y))


class LPIPS(nnx.Module):
    """Learned perceptual distance of frames, differentiable, computed in float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises random weights; `load_lpips` loads trained ones."""
        self.stages, channels = nnx.List(), 3
        for widths in _WIDTHS:
            pairs = zip((channels, *widths), widths, strict=False)
            self.stages.append(nnx.List(Conv(i, o, rngs=rngs) for i, o in pairs))
            channels = widths[-1]
        heads = jax.nn.initializers.constant(1.0)
        self.heads = nnx.List(param(rngs, heads, widths[-1:], (None,)) for widths in _WIDTHS)

    def __call__(self, a: Float[Array, "b t h w 3"], b: Float[Array, "b t h w 3"]) -> Float[Array, "b t"]:
        """Distance between corresponding frames of `a` and `b`; 0 for equal frames.

        Args:
          a: pixels in [-1, 1], at least 16 x 16.
          b: pixels in [-1, 1], of the same size.

        Raises:
          UserError: the frames are smaller than 16 x 16.
        """
        height, width = a.shape[2:4]
        if min(height, width) < SMALLEST_SIDE:
            least = f"{SMALLEST_SIDE} x {SMALLEST_SIDE}"
            raise UserError(f"frames are {height} x {width}; LPIPS needs at least {least}")
        a, b = _standardised(a), _standardised(b)
        distance = jnp.zeros(a.shape[:2], jnp.float32)
        for index, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if index:
                a, b = _max_pool(a), _max_pool(b)
            for conv in stage:
                a, b = conv(a), conv(b)
            square = jnp.square(_unit_length(a) - _unit_length(b))
            distance += (square * over_last_axis(head[...], square)).sum(-1).mean((2, 3))
        return distance


def _standardised(x: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    x = x.astype(jnp.float32)
    return (x - over_last_axis(jnp.array(_SHIFT), x)) / over_last_axis(jnp.array(_SCALE), x)


def _max_pool(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Max pooling over 2 x 2 pixels; drops an odd last row or column."""
    window = (1, 1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


def _unit_length(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Channel vectors divided by their length; zero vectors stay zero, with finite gradients."""
    square = jnp.square(x).sum(-1, keepdims=True)
    is_zero = square == 0.0
    return x / (jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square))) + _EPSILON)
