"""Training the patch transformer and its text encoder by rectified flow on the latents of a frozen VAE."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.core import pixels, rng
from vidgen.core.typing import Array, Bool, Float, Int, Metrics
from vidgen.diffusion.rectified_flow import velocity_loss
from vidgen.diffusion.timesteps import LogitNormal, Uniform
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text.tokenizer import tokenize
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.optimizer import Optimizer
from vidgen.train.vae_folder import has_vae, load_vae, save_vae, vae_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoTask:
    """Velocity prediction under text, with captions dropped at random for classifier-free guidance.

    Attributes:
      vae: workdir of a VAE's training run, or of any run that used one.
      caption_dropout: share of clips trained with an empty prompt.
      density: where in time training looks.
      draws_per_clip: noises and timesteps that each clip is seen with in a step. A clip is encoded once for
        all of them: the transformer's batch is this many times the clips'.
    """

    kind: Literal["text_to_video"] = "text_to_video"
    vae: str
    dit: DiTConfig = DiTConfig()
    text: ByteEncoderConfig = ByteEncoderConfig()
    caption_dropout: float = 0.1
    density: LogitNormal | Uniform = LogitNormal()
    draws_per_clip: int = 1

    def __post_init__(self):
        if self.draws_per_clip < 1:
            raise ValueError(f"draws_per_clip is {self.draws_per_clip}; expected 1 or more")

    def build(self, rngs: nnx.Rngs) -> TextToVideo:
        text = ByteEncoder(self.text, rngs=rngs)
        return TextToVideo(DiT(self.dit, rngs=rngs), text)

    @property
    def apart(self) -> dict[str, Optimizer]:
        return {}

    def product(self, model: nnx.Module) -> nnx.Module:
        return model

    def frozen(self) -> VideoVAE:
        return load_vae(self.vae)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ValueError for clips of a size that the VAE or the transformer does not take."""
        latent_shape(vae_config(self.vae), self.dit, (num_frames, height, width))

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a clip."""
        t, h, w, _ = latent_shape(vae_config(self.vae), self.dit, (num_frames, height, width))
        return math.prod(self.dit.token_grid(t, h, w))

    def with_own_vae(self, workdir: pathlib.Path) -> "TextToVideoTask":
        """The task reading its VAE from `workdir`/vae, where it is copied to when the run begins.

        A run then stands alone: it can be resumed and sampled from wherever it is moved, whatever becomes of
        the VAE's own run. All processes must call this.
        """
        if not has_vae(workdir):
            save_vae(load_vae(self.vae), workdir)
        return dataclasses.replace(self, vae=str(workdir))

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "TextToVideoTask":
        """The task with another type of matrix products."""
        dit, text = (dataclasses.replace(part, dtype=dtype) for part in (self.dit, self.text))
        return dataclasses.replace(self, dit=dit, text=text)

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        tokens, mask = tokenize(batch["caption"], self.text.max_bytes, truncate=True)
        return {"video": batch["video"], "tokens": tokens, "mask": mask}

    def loss(
        self,
        model: nnx.Module,
        frozen: nnx.Module | None,
        batch: Mapping[str, Array],
        key: Array,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        assert isinstance(model, TextToVideo) and isinstance(frozen, VideoVAE)
        clean = jax.lax.stop_gradient(frozen.encode(pixels.to_float(batch["video"])))
        tokens, mask = self._drop_captions(batch["tokens"], batch["mask"], rng.stream(key, "caption"))
        condition = model.condition(tokens, mask)
        # Each clip's draws lie side by side: along a sharded batch, no clip leaves its device.
        clean, condition = jax.tree.map(
            lambda x: jnp.repeat(x, self.draws_per_clip, axis=0), (clean, condition)
        )
        noise = jax.random.normal(rng.stream(key, "noise"), clean.shape)
        timestep = self.density.sample(rng.stream(key, "timestep"), len(clean))
        losses = velocity_loss(lambda x, t: model.velocity(x, t, condition), clean, noise, timestep)
        return losses.mean(), {"latent_std": clean.std()}

    def _drop_captions(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"], key: Array
    ) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
        empty_tokens, empty_mask = tokenize([""], self.text.max_bytes)
        drop = jax.random.bernoulli(key, self.caption_dropout, (len(tokens), 1))
        return jnp.where(drop, empty_tokens, tokens), jnp.where(drop, empty_mask, mask)
