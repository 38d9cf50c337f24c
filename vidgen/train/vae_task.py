"""Training the video VAE: reconstruct, and stay close to a standard normal."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.core import pixels
from vidgen.core.typing import Array, Float, Metrics
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETask:
    """L1 and L2 reconstruction with a small KL penalty (Rombach et al., arXiv 2112.10752).

    Attributes:
      model: shape of the VAE.
      l2_weight: of the squared error, beside an L1 weight of 1; pixels are in [-1, 1].
      kl_weight: of the divergence in nats per latent element.
      statistics_clips: training clips over which the latents' mean and deviation are measured each time the
        VAE is kept for later runs; 0 keeps the running ones of training.
    """

    kind: Literal["vae"] = "vae"
    model: VAEConfig = VAEConfig()
    l2_weight: float = 1.0
    kl_weight: float = 1e-4
    statistics_clips: int = 256

    def __post_init__(self):
        if self.statistics_clips < 0:
            raise ValueError(f"statistics_clips is {self.statistics_clips}; expected 0 or more")

    def build(self, rngs: nnx.Rngs) -> VideoVAE:
        return VideoVAE(self.model, rngs=rngs)

    def frozen(self) -> None:
        return None

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ValueError for clips of a size that the VAE does not take; names the nearest sizes."""
        self.model.latent_shape(num_frames, height, width)

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"video": batch["video"]}

    def loss(
        self, model: nnx.Module, frozen: nnx.Module | None, batch: Mapping[str, Array], key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        assert isinstance(model, VideoVAE)
        video = pixels.to_float(batch["video"])
        posterior = model.posterior(video)
        model.update_statistics(jax.lax.stop_gradient(posterior.mean))
        error = model.decode_raw(posterior.sample(key)) - video
        l1, l2, kl = jnp.abs(error).mean(), jnp.square(error).mean(), posterior.kl()
        # PSNR of pixels in [-1, 1], whose range is 2.
        metrics = {"l1": l1, "kl": kl, "psnr": 10.0 * jnp.log10(4.0 / l2)}
        return l1 + self.l2_weight * l2 + self.kl_weight * kl, metrics
