"""Trains the video VAE with reconstruction, adversarial and KL losses."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int, Metrics, Video
from vidgen.models.adversarial_vae import AdversarialVAE
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import load_lpips
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.variables import freeze
from vidgen.train.adversary import Adversary, with_gradient
from vidgen.train.batch_spec import BatchSpec, empty_batch, spec_of
from vidgen.train.vae_folder import export_vae
from vidgen.train.wavelets import wavelet_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETask:
    """Reconstruction losses with a small KL penalty (Rombach et al., arXiv 2112.10752), and a GAN.

    A term of weight 0 is not computed.

    Attributes:
      model: config of the VAE.
      train: "decoder" leaves the encoder and its latent statistics exactly unchanged (see `run.init_from`),
        so that models trained on its latents stay usable; the encoder then has no gradients, moments or
        averages, and there is no KL penalty.
      l1_weight, l2_weight: weights of the absolute and the squared error; pixels are in [-1, 1].
      wavelet_weight, wavelet_levels: weight and levels of the error in Haar subbands, see `wavelets`.
      perceptual_weight: weight of LPIPS (arXiv:1801.03924), mean over frames.
      perceptual_weights: safetensors file of VGG16 and LPIPS's heads, see `vidgen.models.lpips.params`.
      kl_weight: weight of the divergence in nats per latent element.
      adversary: a discriminator to train against, or None.
      statistics_clips: training clips over which the latents' mean and variance are measured when the VAE is
        exported for later runs, unless only its decoder is trained; 0 uses the running statistics of
        training.
    """

    kind: Literal["vae"] = "vae"
    model: VAEConfig = VAEConfig()
    train: Literal["all", "decoder"] = "all"
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    wavelet_weight: float = 0.0
    wavelet_levels: int = 3
    perceptual_weight: float = 0.0
    perceptual_weights: str | None = None
    kl_weight: float = 1e-4
    adversary: Adversary | None = None
    statistics_clips: int = 256

    def __post_init__(self):
        for name in ("l1_weight", "l2_weight", "wavelet_weight", "perceptual_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.statistics_clips < 0:
            raise UserError(f"statistics_clips is {self.statistics_clips}; expected 0 or more")
        if self.wavelet_levels < 1:
            raise UserError(f"wavelet_levels is {self.wavelet_levels}: it must be at least 1")
        if self.perceptual_weight and self.perceptual_weights is None:
            raise UserError(
                f"perceptual_weight is {self.perceptual_weight}, but perceptual_weights names no file: give "
                "the safetensors file of LPIPS on VGG16, or a weight of 0"
            )

    @property
    def param_groups(self) -> dict[str, Adversary]:
        return {"discriminator": self.adversary} if self.adversary else {}

    def build(self, rngs: nnx.Rngs) -> VideoVAE | AdversarialVAE:
        if self.adversary is None:
            module = VideoVAE(self.model, rngs=rngs)
        else:
            module = AdversarialVAE(self.model, self.adversary.discriminator, rngs=rngs)
        if self.train == "decoder":
            vae = self.inference_model(module)
            vae.encoder, vae.quant_conv = freeze(vae.encoder), freeze(vae.quant_conv)
        return module

    def inference_model(self, model: nnx.Module) -> VideoVAE:
        vae = model.vae if isinstance(model, AdversarialVAE) else model
        assert isinstance(vae, VideoVAE)
        return vae

    def frozen(self) -> LPIPS | None:
        if not self.perceptual_weight or self.perceptual_weights is None:
            return None
        return load_lpips(self.perceptual_weights)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises UserError for a clip size that the VAE does not support; names the nearest sizes."""
        self.model.latent_shape(num_frames, height, width)

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"video": batch["video"]}

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        return spec_of(self.arrays(empty_batch(data)), batch_size)

    def loss(
        self,
        model: nnx.Module,
        frozen: nnx.Module | None,
        batch: Mapping[str, Array],
        key: Array,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        assert isinstance(frozen, LPIPS) == bool(self.perceptual_weight)
        vae, video = self.inference_model(model), pixels.to_float(batch["video"])
        posterior = vae.posterior(video)
        made = vae.decode_raw(posterior.sample(key))
        loss, metrics, gradient = with_gradient(lambda made: self._reconstruction(made, video, frozen), made)
        if self.adversary is not None:
            assert isinstance(model, AdversarialVAE)
            more, others = self.adversary.loss(model.discriminator, video, made, gradient, step)
            loss, metrics = loss + more, metrics | others
        if self.train == "all":
            vae.update_statistics(jax.lax.stop_gradient(posterior.mean))
            if self.kl_weight:
                metrics["kl"] = posterior.kl()
                loss += self.kl_weight * metrics["kl"]
        return loss, metrics

    def finish(
        self,
        model: nnx.Module,
        *,
        step: int,
        workdir: pathlib.Path,
        open_clips: Callable[[], Any] | None,
        mesh: Mesh,
    ) -> None:
        """Exports the VAE for the runs that use it."""
        assert isinstance(model, VideoVAE)
        clips = self.statistics_clips if self.train == "all" else 0
        export_vae(model, workdir, step=step, open_clips=open_clips, num_clips=clips, mesh=mesh)

    def _reconstruction(
        self, made: Video, video: Video, lpips: nnx.Module | None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Weighted sum of the reconstruction losses, and each of them."""
        error = made - video
        losses = {
            "l1": lambda: jnp.abs(error).mean(),
            "l2": lambda: jnp.square(error).mean(),
            "wavelet": lambda: wavelet_loss(made, video, levels=self.wavelet_levels),
        }
        if isinstance(lpips, LPIPS):
            losses["perceptual"] = lambda: lpips(made, video).mean()
        weights = {name: getattr(self, f"{name}_weight") for name in losses}
        found = {name: loss() for name, loss in losses.items() if weights[name]}
        total = sum((weights[name] * loss for name, loss in found.items()), start=jnp.zeros(()))
        # PSNR of pixels in [-1, 1], whose range is 2.
        return total, found | {"psnr": 10.0 * jnp.log10(4.0 / jnp.square(error).mean())}
