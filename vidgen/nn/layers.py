"""Linear maps, convolutions and feed-forward networks. The compute dtype is the input's dtype."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Float
from vidgen.nn.variables import over_last_axis, param, zeros
from vidgen.ops.convolution import conv3d
from vidgen.ops.matmul import matmul
from vidgen.parallel.rules import all_gather_fsdp

Axes = tuple[str | None, ...]
FeedForwardKind = Literal["gelu", "geglu", "swiglu"]

xavier_uniform = jax.nn.initializers.xavier_uniform()
_conv_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def _present_frame_init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "t h w i o"]:
    return jnp.zeros(shape, dtype).at[-1].set(_conv_init(key, shape[1:], dtype))


def _copy_init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "t h w i o"]:
    _, height, width, channels, out_channels = shape
    copies = jnp.tile(jnp.eye(channels, dtype=dtype), (1, out_channels // channels))
    return jnp.zeros(shape, dtype).at[-1, height // 2, width // 2].set(copies)


class Linear(nnx.Module):
    """y = x W + b over the last axis, plus the LoRA term if one is attached (`vidgen.nn.lora`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        axes: Axes = ("embed", "mlp"),
        use_bias: bool = True,
        init: Callable[..., Array] = xavier_uniform,
    ):
        self.axes = axes
        self.kernel = param(rngs, init, (in_features, out_features), axes)
        self.bias = param(rngs, zeros, (out_features,), axes[-1:]) if use_bias else None

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        y = matmul(x, all_gather_fsdp(self.kernel[...].astype(x.dtype), *self.axes))
        if (low_rank := getattr(self, "low_rank", None)) is not None:
            y = y + low_rank(x)
        return y if self.bias is None else y + over_last_axis(self.bias[...], y)


class CausalCache:
    """Frames that causal layers carry from one video chunk to the next (a "feature cache").

    Running a network chunk by chunk, each with `CausalCache(previous.new_frames)`, equals one run over all
    frames. Layers must use the cache in the same order in every chunk.

    Attributes:
      is_first_chunk: whether this is the first chunk of the video.
      new_frames: frames that each layer carries to the next chunk, in layer order.
    """

    def __init__(self, frames: Sequence[Array] | None = None):
        """Starts the cache of one chunk.

        Args:
          frames: `new_frames` of the previous chunk; None for the first chunk.
        """
        self.is_first_chunk = frames is None
        self.new_frames: list[Array] = []
        self._frames = iter(frames or ())

    def swap(self, x: Float[Array, "b t h w c"], count: int) -> Float[Array, "b n h w c"] | None:
        """Returns the `count` frames before `x` (None in the first chunk) and stores the last `count`."""
        if self.is_first_chunk:
            before = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)
        else:
            before = next(self._frames)
        self.new_frames.append(jnp.concatenate([before, x], axis=1)[:, x.shape[1] :])
        return None if self.is_first_chunk else before


class CausalConv3d(nnx.Module):
    """3D convolution, centred in space and causal in time (zero padding before frame 0).

    Weights of earlier frames start at zero, and training on images leaves them there: an image model first
    treats a video as independent frames (as in OD-VAE, arXiv:2409.01199).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        *,
        identity: bool = False,
        rngs: nnx.Rngs,
    ):
        """Initialises the kernel and the bias.

        Args:
          identity: initialise to a copy of the current frame's channels, repeated to fill the outputs.
        """
        self.kernel_size = kernel_size
        shape = (*kernel_size, in_channels, out_channels)
        init = _copy_init if identity else _present_frame_init
        self.kernel = param(rngs, init, shape, (None, None, None, "conv_in", "conv_out"))
        self.bias = param(rngs, zeros, (out_channels,), ("conv_out",))

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: CausalCache | None = None
    ) -> Float[Array, "b t h w o"]:
        """Convolves a video, or with `cache` the next chunk of one."""
        taps, height, width = self.kernel_size
        before = cache.swap(x, taps - 1) if cache and taps > 1 else None
        if before is None:
            taps = min(taps, x.shape[1])  # earlier taps would multiply only the zeros before frame 0
        else:
            x = jnp.concatenate([before, x], axis=1)
        space = ((height // 2, height // 2), (width // 2, width // 2))
        y = conv3d(x, self.kernel[-taps:], padding=((taps - 1 if before is None else 0, 0), *space))
        return y + over_last_axis(self.bias[...], y)


class FeedForward(nnx.Module):
    """Two-layer perceptron, plain (`gelu`, tanh form) or gated (`geglu`, `swiglu`; arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, kind: FeedForwardKind = "gelu", rngs: nnx.Rngs):
        self.kind = kind
        self.up = Linear(dim, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.gate = None if kind == "gelu" else Linear(dim, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, dim, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = self.up(x)
        if self.gate is None:
            hidden = jax.nn.gelu(hidden, approximate=True)
        elif self.kind == "geglu":
            hidden = jax.nn.gelu(self.gate(x), approximate=True) * hidden
        else:
            hidden = jax.nn.silu(self.gate(x)) * hidden
        return self.down(hidden)


def pixel_unshuffle(x: Float[Array, "b t h w c"], factor: int) -> Float[Array, "b t h2 w2 c2"]:
    """Moves `factor` x `factor` pixel blocks into channels, in order channel, column, row (as Wan 2.2)."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // factor, factor, w // factor, factor, c)
    return jnp.transpose(x, (0, 1, 2, 4, 6, 5, 3)).reshape(b, t, h // factor, w // factor, -1)


def pixel_shuffle(x: Float[Array, "b t h w c"], factor: int) -> Float[Array, "b t h2 w2 c2"]:
    """Inverse of `pixel_unshuffle`."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // factor**2, factor, factor)
    return jnp.transpose(x, (0, 1, 2, 6, 3, 5, 4)).reshape(b, t, h * factor, w * factor, -1)
