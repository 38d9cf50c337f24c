"""Blocks of the video VAE: causal residual blocks, per-frame attention, resampling in time and space."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Float
from vidgen.nn.layers import CausalCache, CausalConv3d, Linear
from vidgen.nn.norms import ChannelNorm
from vidgen.nn.variables import over_last_axis, param, zeros
from vidgen.ops.attention import attention
from vidgen.ops.convolution import conv3d, upsampled_conv3d
from vidgen.parallel.rules import constrain

_conv_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class Step(NamedTuple):
    """Resampling between levels: by 2 in height and width, and in time if `temporal`."""

    temporal: bool

    @property
    def factors(self) -> tuple[int, int, int]:
        return (2 if self.temporal else 1, 2, 2)


class ResidualBlock(nnx.Module):
    """Two 3x3x3 causal convolutions, each after norm and SiLU, and a skip connection."""

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

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: CausalCache | None = None
    ) -> Float[Array, "b t h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)), cache)
        y = self.conv2(jax.nn.silu(self.norm2(y)), cache)
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head self-attention among the positions of each frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, rngs=rngs)
        self.to_qkv = Linear(channels, 3 * channels, axes=("conv_in", "conv_out"), rngs=rngs)
        self.out = Linear(channels, channels, axes=("conv_in", "conv_out"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        # Positions as a sequence: each device computes the queries of its shard against all keys.
        positions = constrain(self.norm(x).reshape(b, t, h * w, c), "batch", "time", "tokens", None)
        qkv = self.to_qkv(positions).reshape(b * t, h * w, 1, 3 * c)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        return x + self.out(attention(query, key, value).reshape(x.shape))


class SpatialConv(nnx.Module):
    """3x3 convolution of each frame that halves or doubles height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, *, resize: Literal["half", "double"], rngs: nnx.Rngs
    ):
        self.resize = resize
        shape = (1, 3, 3, in_channels, out_channels)
        self.kernel = param(rngs, _conv_init, shape, (None, None, None, "conv_in", "conv_out"))
        self.bias = param(rngs, zeros, (out_channels,), ("conv_out",))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h2 w2 o"]:
        if self.resize == "double":
            y = upsampled_conv3d(x, self.kernel[...])
        else:
            y = conv3d(x, self.kernel[...], strides=(1, 2, 2), padding=((0, 0), (0, 1), (0, 1)))
        return y + over_last_axis(self.bias[...], y)


def _time_conv(in_channels: int, out_channels: int, rngs: nnx.Rngs) -> CausalConv3d:
    return CausalConv3d(in_channels, out_channels, (3, 1, 1), identity=True, rngs=rngs)


class Downsample(nnx.Module):
    """Halves height and width and, if `temporal`, time: frame 0 stays alone, later frames merge in pairs.

    At initialisation it drops the first frame of each pair, and `Upsample` repeats each frame, so that
    surrounding blocks trained on images work on clips.
    """

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.space = SpatialConv(channels, channels, resize="half", rngs=rngs)
        self.time = _time_conv(channels, channels, rngs) if temporal else None

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 c"]:
        x = self.space(x)
        if self.time is None:
            return x
        before = cache.swap(x, 1) if cache else None
        if before is None and x.shape[1] == 1:
            return x
        frames = x if before is None else jnp.concatenate([before, x], axis=1)
        merged = conv3d(frames, self.time.kernel[...], strides=(2, 1, 1))
        merged = merged + over_last_axis(self.time.bias[...], merged)
        return merged if before is not None else jnp.concatenate([x[:, :1], merged], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width and, if `temporal`, every frame but the first."""

    def __init__(self, channels: int, out_channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.space = SpatialConv(channels, out_channels, resize="double", rngs=rngs)
        self.time = _time_conv(channels, 2 * channels, rngs) if temporal else None

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 o"]:
        if self.time is not None:
            single = 1 if cache is None or cache.is_first_chunk else 0
            x = jnp.concatenate([x[:, :single], self._double(x[:, single:], cache)], axis=1)
        return self.space(x)

    def _double(self, x: Array, cache: CausalCache | None) -> Array:
        """Doubles the frames after frame 0, which the temporal convolution never sees."""
        assert self.time is not None
        if x.shape[1] == 0:
            if cache:
                cache.swap(x, self.time.kernel_size[0] - 1)
            return x
        b, t, h, w, c = x.shape
        pairs = self.time(x, cache).reshape(b, t, h, w, 2, c)
        return jnp.transpose(pairs, (0, 1, 4, 2, 3, 5)).reshape(b, 2 * t, h, w, c)


class MidBlock(nnx.Module):
    """Residual block, attention within frames and residual block, at the lowest resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.first = ResidualBlock(channels, channels, rngs=rngs)
        self.attention = FrameAttention(channels, rngs=rngs)
        self.second = ResidualBlock(channels, channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: CausalCache | None = None
    ) -> Float[Array, "b t h w c"]:
        return self.second(self.attention(self.first(x, cache)), cache)


class DownBlock(nnx.Module):
    """One level of the encoder: residual blocks, then downsampling except in the last level.

    With `shortcut`, `average_down` of the input is added to the output (Wan 2.2; DC-AE, arXiv 2410.10733):
    the level then starts near the identity and learns much faster.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        step: Step | None,
        shortcut: bool,
        rngs: nnx.Rngs,
    ):
        self.factors = step.factors if step else (1, 1, 1)
        self.out_channels = out_channels
        self.shortcut = shortcut
        self.blocks = nnx.List(
            ResidualBlock(out_channels if index else in_channels, out_channels, rngs=rngs)
            for index in range(num_blocks)
        )
        self.downsample = Downsample(out_channels, temporal=step.temporal, rngs=rngs) if step else None

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 o"]:
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.downsample is not None:
            y = self.downsample(y, cache)
        return y + average_down(x, self.out_channels, self.factors) if self.shortcut else y


class UpBlock(nnx.Module):
    """One level of the decoder: residual blocks, then upsampling except in the last level.

    With `shortcut`, `repeat_up` of the input is added to the upsampled output (Wan 2.2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        step: Step | None,
        shortcut: bool,
        rngs: nnx.Rngs,
    ):
        self.factors = step.factors if step else (1, 1, 1)
        self.out_channels = out_channels
        self.shortcut = shortcut and step is not None
        self.blocks = nnx.List(
            ResidualBlock(out_channels if index else in_channels, out_channels, rngs=rngs)
            for index in range(num_blocks)
        )
        upsampled = out_channels if shortcut else out_channels // 2
        self.upsample = Upsample(out_channels, upsampled, temporal=step.temporal, rngs=rngs) if step else None

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: CausalCache | None = None
    ) -> Float[Array, "b t2 h2 w2 o"]:
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.upsample is not None:
            y = self.upsample(y, cache)
        if not self.shortcut:
            return y
        begins = cache is None or cache.is_first_chunk
        return y + repeat_up(x, self.out_channels, self.factors, begins=begins)


def average_down(
    x: Float[Array, "b t h w i"], channels: int, factors: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 o"]:
    """Moves spacetime blocks into channels, then averages groups of channels (or repeats) to `channels`.

    If time halves, a zero frame is put before frame 0, so that frame 0 merges with no other frame.
    """
    ft, fh, fw = factors
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % ft, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // ft, ft, h // fh, fh, w // fw, fw, c)
    x = jnp.transpose(x, (0, 1, 3, 5, 7, 2, 4, 6))
    x = x.reshape(*x.shape[:4], -1)
    x = jnp.repeat(x, max(channels // x.shape[-1], 1), axis=-1)
    return x.reshape(*x.shape[:4], channels, -1).mean(-1)


def repeat_up(
    x: Float[Array, "b t h w i"], channels: int, factors: tuple[int, int, int], *, begins: bool = True
) -> Float[Array, "b t2 h2 w2 o"]:
    """Repeats channels and moves them into spacetime blocks.

    Args:
      begins: `x` starts with frame 0, which gives a single frame.
    """
    ft, fh, fw = factors
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, channels * ft * fh * fw // c, axis=-1).reshape(b, t, h, w, channels, ft, fh, fw)
    x = jnp.transpose(x, (0, 1, 5, 2, 6, 3, 7, 4)).reshape(b, t * ft, h * fh, w * fw, channels)
    return x[:, ft - 1 :] if begins else x
