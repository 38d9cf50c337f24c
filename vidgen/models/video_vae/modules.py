"""Blocks of the video VAE: causal residual blocks, per-frame attention, resampling in time and space."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Float
from vidgen.nn.layers import CausalConv3d, Linear
from vidgen.nn.norms import ChannelNorm
from vidgen.nn.variables import param, zeros
from vidgen.ops.attention import attention
from vidgen.ops.convolution import conv3d

_conv_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class ResidualBlock(nnx.Module):
    """Two normalised 3x3x3 causal convolutions and a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(in_channels, rngs=rngs)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3), rngs=rngs)
        self.norm2 = ChannelNorm(out_channels, rngs=rngs)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3), rngs=rngs)
        self.shortcut = (
            None
            if in_channels == out_channels
            else CausalConv3d(in_channels, out_channels, (1, 1, 1), rngs=rngs)
        )

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head self-attention among the positions of each frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, rngs=rngs)
        self.to_qkv = Linear(channels, 3 * channels, axes=("conv_in", "conv_out"), rngs=rngs)
        self.out = Linear(channels, channels, axes=("conv_in", "conv_out"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b * t, h * w, 1, 3 * c)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        return x + self.out(attention(query, key, value).reshape(x.shape))


class SpatialConv(nnx.Module):
    """A 3x3 convolution of each frame."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.stride = stride
        shape = (1, 3, 3, in_channels, out_channels)
        self.kernel = param(rngs, _conv_init, shape, (None, None, None, "conv_in", "conv_out"))
        self.bias = param(rngs, zeros, (out_channels,), ("conv_out",))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h2 w2 o"]:
        side = (1, 1) if self.stride == 1 else (0, 1)
        strides = (1, self.stride, self.stride)
        y = conv3d(x, self.kernel[...], strides=strides, padding=((0, 0), side, side))
        return y + self.bias[...].astype(x.dtype)


class Downsample(nnx.Module):
    """Halves height and width and, if `temporal`, time: frame 0 stays alone, then pairs of frames are merged."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.space = SpatialConv(channels, channels, stride=2, rngs=rngs)
        self.time = CausalConv3d(channels, channels, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        x = self.space(x)
        if self.time is None or x.shape[1] == 1:
            return x
        merged = conv3d(x, self.time.kernel[...], strides=(2, 1, 1)) + self.time.bias[...].astype(x.dtype)
        return jnp.concatenate([x[:, :1], merged], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width, halves channels and, if `temporal`, doubles time of all but the first frame."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.space = SpatialConv(channels, channels // 2, rngs=rngs)
        self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 o"]:
        if self.time is not None and x.shape[1] > 1:
            b, t, h, w, c = x.shape
            pairs = self.time(x[:, 1:]).reshape(b, t - 1, h, w, 2, c)
            pairs = jnp.transpose(pairs, (0, 1, 4, 2, 3, 5)).reshape(b, 2 * (t - 1), h, w, c)
            x = jnp.concatenate([x[:, :1], pairs], axis=1)
        return self.space(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class MidBlock(nnx.Module):
    """Residual block, attention within frames, residual block, at the lowest resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.first = ResidualBlock(channels, channels, rngs=rngs)
        self.attention = FrameAttention(channels, rngs=rngs)
        self.second = ResidualBlock(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return self.second(self.attention(self.first(x)))
