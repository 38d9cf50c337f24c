"""Patch discriminator of videos: one logit per spacetime patch."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Video
from vidgen.models.discriminator.config import DiscriminatorConfig
from vidgen.nn.variables import Buffer, over_last_axis, param, zeros
from vidgen.ops.convolution import conv3d

_SLOPE = 0.2
_he_normal = jax.nn.initializers.variance_scaling(2.0 / (1.0 + _SLOPE**2), "fan_in", "normal")
_plain_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class _Conv(nnx.Module):
    """3D convolution centred in time and space, with zero padding."""

    def __init__(self, channels: tuple[int, int], kernel, strides, *, init=_he_normal, rngs: nnx.Rngs):
        self.strides = strides
        axes = (None, None, None, "conv_in", "conv_out")
        self.kernel = param(rngs, init, (*kernel, *channels), axes)
        self.bias = param(rngs, zeros, channels[1:], ("conv_out",))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t2 h2 w2 o"]:
        time, height, width = ((size - 1) // 2 for size in self.kernel.shape[:3])
        padding = ((time, time), (height, height), (width, width))
        y = conv3d(x, self.kernel[...], strides=self.strides, padding=padding)
        return y + over_last_axis(self.bias[...], y)


class Discriminator(nnx.Module):
    """Patch discriminator of real and reconstructed videos, with any number of frames (an image has one).

    It has no normalisation layers, so that a clip's logits do not depend on its batch, and R1 penalises the
    gradients of the network itself (as in StyleGAN and R3GAN, arXiv:2501.05441). Buffers hold running
    averages of the mean logits, for LeCam regularisation.
    """

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        dims = [3, *(config.base_dim * mult for mult in config.dim_mult)]
        self.config = config
        self.levels = nnx.List(
            _Conv((dim_in, dim_out), (3, 4, 4), (2 if temporal else 1, 2, 2), rngs=rngs)
            for dim_in, dim_out, temporal in zip(dims, dims[1:], config.temporal_downsample, strict=False)
        )
        self.mid = _Conv((dims[-1], dims[-1]), (3, 3, 3), (1, 1, 1), rngs=rngs)
        self.out = _Conv((dims[-1], 1), (3, 3, 3), (1, 1, 1), init=_plain_normal, rngs=rngs)
        self.real_logit, self.fake_logit, self.count = (Buffer(jnp.zeros(())) for _ in range(3))

    def __call__(self, video: Video) -> Float[Array, "b t2 h2 w2"]:
        """Logits of the patches, float32; positive means real.

        Args:
          video: pixels in [-1, 1], `b t h w 3`.

        Raises:
          UserError: the frames are smaller than one patch.
        """
        factor = self.config.spatial_factor
        if min(video.shape[2:4]) < factor:
            raise UserError(
                f"frames are {video.shape[2]} x {video.shape[3]}; a discriminator of {len(self.levels)} "
                f"levels needs at least {factor} x {factor}: use fewer levels (discriminator.dim_mult)"
            )
        x = video.astype(self.config.dtype)
        for layer in (*self.levels, self.mid):
            x = jax.nn.leaky_relu(layer(x), _SLOPE)
        return self.out(x).astype(jnp.float32)[..., 0]

    def update_averages(self, real: Float[Array, ""], fake: Float[Array, ""], decay: float) -> None:
        """Updates the running averages with a batch's mean logits: cumulative at first, then exponential."""
        rate = jnp.maximum(1.0 / (self.count[...] + 1.0), 1.0 - decay)
        self.real_logit[...] += rate * (real - self.real_logit[...])
        self.fake_logit[...] += rate * (fake - self.fake_logit[...])
        self.count[...] += 1.0
