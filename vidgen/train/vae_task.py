"""Trains the video VAE with reconstruction, adversarial and KL losses."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Metrics, Video
from vidgen.models.adversarial_vae import AdversarialVAE
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import load_lpips
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.variables import freeze
from vidgen.train.adversary import Adversary, with_gradient
from vidgen.train.evaluator import Evaluator, Previews
from vidgen.train.optimizer import REST
from vidgen.train.task import Context, Frozen, Phase
from vidgen.train.vae_folder import export_vae
from vidgen.train.video_task import Videos, VideoTask
from vidgen.train.wavelets import wavelet_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETask(VideoTask):
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

    scores: ClassVar[Literal["reconstructions", "prompts", "none"]] = "reconstructions"

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
    def phases(self) -> tuple[Phase, ...]:
        """One: both players' gradients come from one backward pass through the reconstruction."""
        adversary = {"discriminator": self.adversary} if self.adversary else {}
        return (Phase(loss=self.loss, optimizers={REST: None, **adversary}),)

    @property
    def network(self) -> tuple[str, VAEConfig]:
        return "model", self.model

    def vae_config(self) -> VAEConfig:
        return self.model

    def build(self, rngs: nnx.Rngs) -> VideoVAE | AdversarialVAE:
        if self.adversary is None:
            module = VideoVAE(self.model, rngs=rngs)
        else:
            module = AdversarialVAE(self.model, self.adversary.discriminator, rngs=rngs)
        if self.train == "decoder":
            vae = self.inference_model(module)
            vae.encoder, vae.quant_conv = freeze(vae.encoder), freeze(vae.quant_conv)
        return module

    def inference_model(self, model: Any) -> VideoVAE:
        return model if self.adversary is None else model.vae

    def frozen(self) -> dict[str, Frozen]:
        path = self.perceptual_weights
        if not self.perceptual_weight or path is None:
            return {}
        build = lambda: LPIPS(rngs=nnx.Rngs(0))  # noqa: E731
        return {"lpips": Frozen(source=path, load=lambda: load_lpips(path), build=build)}

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        self.model.latent_shape(num_frames, height, width)

    def evaluators(self, previews: Previews) -> Sequence[Evaluator]:
        return previews.reconstructions()

    def loss(self, context: Context[Any, Videos]) -> tuple[Float[Array, ""], Metrics]:
        """Loss of the VAE, and of its adversary if there is one."""
        vae, video = self.inference_model(context.model), pixels.to_float(context.batch.video)
        posterior = vae.posterior(video)
        made = vae.decode_raw(posterior.sample(context.key))
        loss, metrics, gradient = with_gradient(
            lambda made: self._reconstruction(made, video, context.frozen.get("lpips")), made
        )
        if self.adversary is not None:
            discriminator = context.model.discriminator
            more, others = self.adversary.loss(discriminator, video, made, gradient, context.step)
            loss, metrics = loss + more, metrics | others
        if self.train == "all":
            vae.update_statistics(jax.lax.stop_gradient(posterior.mean))
            if self.kl_weight:
                metrics["kl"] = posterior.kl()
                loss += self.kl_weight * metrics["kl"]
        return loss, metrics

    def finish(
        self,
        model: VideoVAE,
        *,
        step: int,
        workdir: pathlib.Path,
        open_clips: Callable[[], Any] | None,
        mesh: Mesh,
    ) -> None:
        """Exports the VAE for the runs that use it."""
        clips = self.statistics_clips if self.train == "all" else 0
        export_vae(model, workdir, step=step, open_clips=open_clips, num_clips=clips, mesh=mesh)

    def _reconstruction(
        self, made: Video, video: Video, lpips: LPIPS | None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Weighted sum of the reconstruction losses, and each of them."""
        error = made - video
        losses = {
            "l1": lambda: jnp.abs(error).mean(),
            "l2": lambda: jnp.square(error).mean(),
            "wavelet": lambda: wavelet_loss(made, video, levels=self.wavelet_levels),
        }
        if lpips is not None:
            losses["perceptual"] = lambda: lpips(made, video).mean()
        weights = {name: getattr(self, f"{name}_weight") for name in losses}
        found = {name: loss() for name, loss in losses.items() if weights[name]}
        total = sum((weights[name] * loss for name, loss in found.items()), start=jnp.zeros(()))
        # PSNR of pixels in [-1, 1], whose range is 2.
        return total, found | {"psnr": 10.0 * jnp.log10(4.0 / jnp.square(error).mean())}
