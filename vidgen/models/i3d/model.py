"""I3D, the inflated Inception-v1 that gives the features of the Frechet video distance (FVD).

Carreira & Zisserman 2017, Quo Vadis, Action Recognition? (arXiv:1705.07750), on RGB, with the 400 classes of
Kinetics-400; Unterthiner et al. 2018, Towards Accurate Generative Models of Video (arXiv:1812.01717).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float
from vidgen.nn.variables import Buffer, ones, over_last_axis, param, zeros
from vidgen.ops.convolution import conv3d

__all__ = ["FEWEST_FRAMES", "I3D", "NUM_CLASSES", "resize"]

NUM_CLASSES = 400
FEWEST_FRAMES = 9
"""Smallest number of frames: three halvings of time leave two, the window of the final average pooling."""

_SIDE = 224
_EPSILON = 1e-3

_MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Output channels of each block's units b0, b1a, b1b, b2a, b2b and b3b."""

_POOL_BEFORE = {"mixed_4b": ((3, 3, 3), (2, 2, 2)), "mixed_5b": ((2, 2, 2), (2, 2, 2))}
"""Window and strides of the max pooling before a block."""

_he_normal = jax.nn.initializers.he_normal()

Sizes = tuple[int, int, int]


class Unit(nnx.Module):
    """Convolution, batch norm with fixed statistics from training, and ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, size: Sizes, *, strides: Sizes = (1, 1, 1), rngs: nnx.Rngs
    ):
        self.strides = strides
        shape = (*size, in_channels, out_channels)
        self.kernel = param(rngs, _he_normal, shape, (None, None, None, "conv_in", "conv_out"))
        self.scale = param(rngs, ones, (out_channels,), ("conv_out",))
        self.bias = param(rngs, zeros, (out_channels,), ("conv_out",))
        self.mean = Buffer(jnp.zeros(out_channels))
        self.variance = Buffer(jnp.ones(out_channels))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t2 h2 w2 o"]:
        sizes = zip(x.shape[1:4], self.kernel.shape[:3], self.strides, strict=True)
        padding = tuple(_same_padding(*size) for size in sizes)
        y = conv3d(x, self.kernel[...], strides=self.strides, padding=padding)
        gain = over_last_axis(self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON), y)
        centred = y - over_last_axis(self.mean[...], y)
        return jax.nn.relu(centred * gain + over_last_axis(self.bias[...], y))


class Mixed(nnx.Module):
    """Inception block: four parallel branches, concatenated along channels."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(in_channels, b0, (1, 1, 1), rngs=rngs)
        self.b1a = Unit(in_channels, b1a, (1, 1, 1), rngs=rngs)
        self.b1b = Unit(b1a, b1b, (3, 3, 3), rngs=rngs)
        self.b2a = Unit(in_channels, b2a, (1, 1, 1), rngs=rngs)
        self.b2b = Unit(b2a, b2b, (3, 3, 3), rngs=rngs)
        self.b3b = Unit(in_channels, b3b, (1, 1, 1), rngs=rngs)
        self.channels = b0 + b1b + b2b + b3b

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """The RGB network, for inference in float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises random weights; `load_i3d` loads trained ones."""
        self.conv_1a = Unit(3, 64, (7, 7, 7), strides=(2, 2, 2), rngs=rngs)
        self.conv_2b = Unit(64, 64, (1, 1, 1), rngs=rngs)
        self.conv_2c = Unit(64, 192, (3, 3, 3), rngs=rngs)
        channels = 192
        for name, widths in _MIXED.items():
            block = Mixed(channels, widths, rngs=rngs)
            setattr(self, name, block)
            channels = block.channels
        self.logits_kernel = param(rngs, _he_normal, (channels, NUM_CLASSES), ("embed", None))
        self.logits_bias = param(rngs, zeros, (NUM_CLASSES,), (None,))

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b 400"]:
        """FVD features: class logits averaged over time.

        Args:
          video: pixels in [-1, 1], at least 9 frames of any size; `resize` scales them to 224 x 224.

        Raises:
          UserError: the clip has fewer than 9 frames.
        """
        if video.shape[1] < FEWEST_FRAMES:
            raise UserError(f"a clip has {video.shape[1]} frames; I3D needs at least {FEWEST_FRAMES}")
        x = self.conv_1a(resize(video))
        x = self.conv_2b(_max_pool(x, (1, 3, 3), (1, 2, 2)))
        x = _max_pool(self.conv_2c(x), (1, 3, 3), (1, 2, 2))
        for name in _MIXED:
            if name in _POOL_BEFORE:
                x = _max_pool(x, *_POOL_BEFORE[name])
            x = getattr(self, name)(x)
        # Average pooling (2 frames, 7 x 7 positions) and the mean over time commute with the linear logits.
        x = x.mean((2, 3))
        x = (0.5 * (x[:, 1:] + x[:, :-1])).mean(1)
        logits = x @ self.logits_kernel[...]
        return logits + over_last_axis(self.logits_bias[...], logits)


def resize(video: Float[Array, "b t h w 3"]) -> Float[Array, "b t 224 224 3"]:
    """Resizes frames to 224 x 224, float32: bilinear, without anti-aliasing, ignoring the aspect ratio.

    Pixel centres are at half-integers, as in the PyTorch ports of FVD. The authors' code uses TensorFlow 1's
    grid, which is shifted by up to half a pixel.
    """
    b, t, _, _, c = video.shape
    shape = (b, t, _SIDE, _SIDE, c)
    return jax.image.resize(video.astype(jnp.float32), shape, "bilinear", antialias=False)


def _max_pool(x: Float[Array, "b t h w c"], window: Sizes, strides: Sizes) -> Float[Array, "b t2 h2 w2 c"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), "SAME")


def _same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding (before, after): ceil(length / stride) outputs, an odd zero at the end."""
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2
