"""Mean and variance of each latent channel over training clips, measured with the current weights."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, UInt8
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel import processes
from vidgen.parallel.rules import constrain

__all__ = ["Moments", "measure_latents", "with_statistics"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and variance of numbers, per channel, in float64.

    Attributes:
      count: numbers per channel.
      mean: [c].
      variance: [c], population variance: divided by `count`.
    """

    count: int
    mean: Float[np.ndarray, "c"]
    variance: Float[np.ndarray, "c"]

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets (Chan, Golub and LeVeque, 1983), without cancelling sums of squares."""
        count = self.count + other.count
        share = other.count / count
        shift = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * shift**2
        return Moments(count=count, mean=self.mean + share * shift, variance=variance)


def measure_latents(
    vae: VideoVAE, batches: Iterable[Mapping[str, Any]], *, num_clips: int, mesh: Mesh | None = None
) -> Moments:
    """Moments of the raw mean latents of the first `num_clips` clips, with equal weight for each latent.

    Holds one batch at a time; a clip's moments do not depend on its batch.

    Args:
      batches: with `video` uint8 [b t h w 3] and `name`, of any sizes that the VAE supports; with several
        processes each passes its part of the batch, and all must call this.
      num_clips: at least 1; fewer are used if there are no more.
      mesh: mesh over which batches are sharded; None is one device.

    Raises:
      UserError: there is no clip, or the latents of one are not finite.
    """
    seen: Moments | None = None
    remaining = num_clips
    for batch in batches:
        video = batch["video"]
        if mesh is not None:
            video = processes.global_batch({"video": video}, mesh)["video"]
        means, variances = jax.device_get(_clip_moments(vae, video))
        taken = min(remaining, len(means))
        if not (np.isfinite(means[:taken]).all() and np.isfinite(variances[:taken]).all()):
            raise UserError(
                f"the latents of a training clip are not finite; one of {list(batch['name'])}. The VAE "
                "cannot be used: look at the clips, and at the losses of its training"
            )
        frames, height, width = batch["video"].shape[1:4]
        size = int(np.prod(vae.config.latent_shape(frames, height, width)[:3]))
        for mean, variance in zip(means[:taken], variances[:taken], strict=True):
            clip = Moments(count=size, mean=mean.astype(np.float64), variance=variance.astype(np.float64))
            seen = clip if seen is None else seen.merge(clip)
        remaining -= taken
        if remaining <= 0:
            break
    if seen is None:
        raise UserError("latent statistics need at least one clip, found none")
    return seen


def with_statistics(vae: VideoVAE, moments: Moments) -> VideoVAE:
    """Copy of the VAE that shares its weights and normalises latents by `moments`."""
    copy = jax.tree.map(lambda x: x, vae)
    copy.latents_mean[...] = jnp.asarray(moments.mean, jnp.float32)
    copy.latents_variance[...] = jnp.asarray(moments.variance, jnp.float32)
    return copy


@jax.jit
def _clip_moments(
    vae: VideoVAE, video: UInt8[Array | np.ndarray, "b t h w 3"]
) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
    """Mean and variance of each clip's raw latents, per channel, replicated on every device."""
    raw = vae.posterior(pixels.to_float(jnp.asarray(video))).mean
    return constrain(raw.mean((1, 2, 3)), None, None), constrain(raw.var((1, 2, 3)), None, None)
