"""Trains the DiT and its text encoder by rectified flow on the latents of a frozen VAE."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core import pixels, rng
from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.core.tokens import Tokens, patchify
from vidgen.core.typing import Array, Float, Metrics
from vidgen.diffusion.rectified_flow import velocity_loss
from vidgen.diffusion.timesteps import AnyDensity, LogitNormal
from vidgen.diffusion.weighting import AnyWeighting, mean_weight
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import MATRICES
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.embeddings import grid_positions
from vidgen.nn.lora import LoRAOptions, add_low_rank
from vidgen.nn.variables import Constant, freeze
from vidgen.parallel import processes
from vidgen.parallel.processes import check_tokens
from vidgen.sampling.conditioners import AnyConditioner
from vidgen.sampling.conditioning import TrainingClips, TrainingConditioner, check_conditioners, merged
from vidgen.sampling.options import SamplingOptions
from vidgen.train.batch_spec import BatchSpec, empty_batch, spec_of
from vidgen.train.captions import ByteCaptions, EncodedCaptions
from vidgen.train.check_sizes import check_preview, check_videos
from vidgen.train.evaluator import Evaluator, Previews
from vidgen.train.long_captions import LongCaptions
from vidgen.train.options import RunOptions
from vidgen.train.packed_clips import pack_rows
from vidgen.train.packed_data import check_latents, packed_loader
from vidgen.train.task import Context, Frozen, Total
from vidgen.train.text_features import TextFeatures
from vidgen.train.vae_folder import has_vae, load_vae, save_vae, vae_config
from vidgen.train.video_task import VideoTask


class ClipBatch(NamedTuple):
    """Videos of one size, or packed rows of latents, on the host (NumPy) or on the device.

    Attributes:
      conditions: arrays of `TrainingConditioner.host` by name, with leading axes sequence and clip.
      video: uint8 `b t h w 3`; None for packed rows.
      patches, positions, clip_ids: as in `Tokens`; None for videos.
    """

    conditions: Mapping[str, Any] = {}
    video: Any = None
    patches: Any = None
    positions: Any = None
    clip_ids: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoTask(VideoTask):
    """Text-conditioned velocity prediction, with random caption dropout for classifier-free guidance.

    Batches are videos of one size, which the VAE encodes on the device, or packed rows of latents of any
    sizes (`vidgen.data.packing`); the loss of a clip is the same in both. Clips of a batch have equal
    weights; micro-batches have equal weights too, whatever the number of clips in their packed rows.

    Attributes:
      vae: workdir of a VAE's training run, or of any run that used one.
      caption_dropout: share of clips trained with an empty prompt.
      density: distribution of the training timesteps.
      weighting: loss weight by timestep, 1 on average over the density; None is uniform.
      text_encoder: a large text encoder, which is not trained, instead of `text`.
      lora: trains LoRA matrices of the transformer and nothing else; None trains all weights.
      conditioners: make further conditions: of known frames, for image to video.
      draws_per_clip: noises and timesteps per clip and step. A clip is encoded once for all of them: the
        transformer's batch is this many times the clips'.
      sampling: default sampling options, for previews and later use of the model.
    """

    kind: Literal["text_to_video"] = "text_to_video"
    vae: str
    dit: DiTConfig = DiTConfig()
    text: ByteEncoderConfig = ByteEncoderConfig()
    caption_dropout: float = 0.1
    density: AnyDensity = LogitNormal()
    weighting: AnyWeighting | None = None
    text_encoder: TextFeatures | None = None
    lora: LoRAOptions | None = None
    conditioners: tuple[AnyConditioner, ...] = ()
    draws_per_clip: int = 1
    sampling: SamplingOptions = SamplingOptions()

    scores: ClassVar[Literal["reconstructions", "prompts", "none"]] = "prompts"

    def __post_init__(self):
        if self.dit.image_dim is not None:
            raise UserError(
                "dit.image_dim: training supports no transformers with image features; set it to None"
            )
        if self.draws_per_clip < 1:
            raise UserError(f"draws_per_clip is {self.draws_per_clip}; expected 1 or more")

    def build(self, rngs: nnx.Rngs) -> TextToVideo:
        text = ByteEncoder(self.text, rngs=rngs) if self.text_encoder is None else None
        dit = DiT(self.dit, rngs=rngs)
        if self.lora is not None:
            dit = freeze(dit, Constant, bf16_pattern=MATRICES if self.dit.dtype == "bfloat16" else None)
            add_low_rank(dit, self.lora, rngs=rngs)
            text = text and freeze(text, Constant)
        return TextToVideo(dit, text)

    @property
    def network(self) -> tuple[str, DiTConfig]:
        return "dit", self.dit

    def frozen(self) -> dict[str, Frozen]:
        build = lambda: VideoVAE(self.vae_config(), rngs=nnx.Rngs(0))  # noqa: E731
        return {"vae": Frozen(source=self.vae, load=lambda: load_vae(self.vae), build=build)}

    def vae_config(self) -> VAEConfig:
        return vae_config(self.vae)

    def in_workdir(self, workdir: pathlib.Path) -> "TextToVideoTask":
        return dataclasses.replace(self, vae=str(workdir)) if has_vae(workdir) else self

    def check(self, data: Any, run: RunOptions, mesh: Mesh) -> None:
        if data.packing is not None:
            self._check_conditioners_of_latents()
            check_preview(data, self.check_size)
            check_latents(data, self.dit, self.vae, run, mesh)
            return

        def check_size(*size: int) -> None:
            self.check_size(*size)
            check_tokens(self.num_tokens(*size), mesh)

        check_videos(data, run, mesh, check_size)

    def loader(self, data: Any) -> Callable[..., Any]:
        return super().loader(data) if data.packing is None else packed_loader(data, self.dit)

    def evaluators(self, previews: Previews) -> Sequence[Evaluator]:
        return previews.samples(self)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises UserError for a clip size that the VAE or the transformer does not support."""
        vae = vae_config(self.vae)
        latent_shape(vae, self.dit, (num_frames, height, width))
        check_conditioners(self.all_conditioners, self.dit, vae)

    def _check_conditioners_of_latents(self) -> None:
        for conditioner in self.conditioners:
            if conditioner.needs_video:
                raise ConfigError(
                    f"config.data.kind is latents, and {conditioner} in config.task.conditioners needs "
                    "videos: leave it out, or train on data of one size"
                )

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Number of tokens of a clip."""
        t, h, w, _ = latent_shape(vae_config(self.vae), self.dit, (num_frames, height, width))
        return math.prod(self.dit.token_grid(t, h, w))

    def sampling_options(self) -> SamplingOptions:
        """`sampling`, with a default shift from `density`: the noise levels of training."""
        return self.sampling.with_default_shift(self.density.shift)

    def prepare(self, workdir: pathlib.Path) -> "TextToVideoTask":
        """Copies the VAE to `workdir`/vae."""
        missing = not has_vae(workdir)
        # No process looks for the VAE while another writes it, or reads it before it is complete.
        processes.sync("the run's VAE was looked for")
        if missing:
            save_vae(load_vae(self.vae), workdir)
        processes.sync("the run's VAE is there")
        return dataclasses.replace(self, vae=str(workdir))

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "TextToVideoTask":
        """The task with another dtype of matrix products."""
        dit, text = (dataclasses.replace(part, dtype=dtype) for part in (self.dit, self.text))
        return dataclasses.replace(self, dit=dit, text=text)

    def arrays(self, batch: Mapping[str, Any]) -> ClipBatch:
        if self.text_encoder is None:
            self._long_captions.note(batch)
        if "rows" not in batch:
            clips = ClipBatch(video=batch["video"])
            captions = [[caption] for caption in batch["caption"]]
        else:
            packed = pack_rows(
                batch["rows"],
                self.dit,
                tokens_per_row=batch["tokens_per_row"],
                clips_per_row=batch["clips_per_row"],
            )
            clips = ClipBatch(patches=packed.patches, positions=packed.positions, clip_ids=packed.clip_ids)
            captions = packed.captions
        return clips._replace(conditions=_joined([c.host(captions) for c in self.all_conditioners]))

    @functools.cached_property
    def _long_captions(self) -> LongCaptions:
        return LongCaptions(self.text.max_bytes)

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        batch = empty_batch(data)
        clips = batch.get("clips_per_row", 1)
        conditions = _joined([c.host_spec(batch_size, clips) for c in self.all_conditioners])
        without = dataclasses.replace(self, text_encoder=None, conditioners=()).arrays(batch)
        return spec_of(without, batch_size)._replace(conditions=conditions)

    @property
    def all_conditioners(self) -> tuple[TrainingConditioner, ...]:
        """The conditioner of captions, then `conditioners`."""
        if self.text_encoder is None:
            captions = ByteCaptions(config=self.text, dropout=self.caption_dropout)
        else:
            captions = EncodedCaptions(
                encoder=self.text_encoder, dim=self.dit.text_dim, dropout=self.caption_dropout
            )
        return (captions, *self.conditioners)

    def loss(self, context: Context[TextToVideo, ClipBatch]) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over clips, however many a sequence has."""
        model, key = context.model, context.key
        clips = self._clips(context)
        condition = merged([c.observe(clips, rng.stream(key, c.key_name)) for c in self.all_conditioners])
        tokens = clips.tokens._replace(known_mask=condition.known_mask)
        # The draws of a clip are adjacent: in a sharded batch, no clip leaves its device.
        repeat = lambda x: jnp.repeat(x, self.draws_per_clip, axis=0)  # noqa: E731
        streams = jax.tree.map(repeat, dict(condition.streams))
        shared = tokens.positions if len(tokens.positions) == 1 else None  # By all clips.
        tokens = jax.tree.map(repeat, tokens)
        tokens = tokens if shared is None else tokens._replace(positions=shared)
        noise = self._noise(rng.stream(key, "noise"), tokens, clips)
        timestep, weight = self._timesteps(key, tokens, clips.clips)
        losses, present = velocity_loss(lambda x, t: model.dit(x, t, streams)[0], tokens, noise, timestep)
        metrics = {"latent_std": tokens.patches.std()}
        if tokens.clip_ids is not None:
            is_token = tokens.clip_ids > 0
            metrics = {
                "latent_std": tokens.patches.std(where=is_token[..., None]),
                "fill": is_token.mean(),
                "clips": Total(present.sum() / self.draws_per_clip),
            }
        return (losses * weight).sum() / jnp.maximum(present.sum(), 1), metrics

    def _clips(self, context: Context[TextToVideo, ClipBatch]) -> TrainingClips:
        """The clips of a batch as clean tokens: packed latents, or videos, which the VAE encodes."""
        batch = context.batch
        if batch.patches is not None:
            tokens = Tokens(batch.patches.astype(jnp.float32), batch.positions, clip_ids=batch.clip_ids)
            clips = max(array.shape[1] for array in batch.conditions.values())
            return TrainingClips(tokens, clips, batch.conditions, context.model)
        vae = context.frozen["vae"]
        video = pixels.to_float(batch.video)
        clean = jax.lax.stop_gradient(vae.encode(video))
        positions = grid_positions(*self.dit.token_grid(*clean.shape[1:4]))[None]
        tokens = Tokens(patchify(clean, self.dit.patch_size), positions)
        return TrainingClips(tokens, 1, batch.conditions, context.model, vae, video)

    def _noise(self, key: Array, tokens: Tokens, clips: TrainingClips) -> Float[Array, "b s p"]:
        """Noise of each token; that of videos is drawn on the grid of their latents, as in sampling."""
        if clips.vae is None or clips.video is None:
            return jax.random.normal(key, tokens.patches.shape)
        shape = clips.vae.config.latent_shape(*clips.video.shape[1:4])
        return patchify(jax.random.normal(key, (len(tokens.patches), *shape)), self.dit.patch_size)

    def _timesteps(
        self, key: Array, tokens: Tokens, clips: int
    ) -> tuple[Float[Array, "b g"], Float[Array, "b g"]]:
        """Timestep and loss weight of each of the `clips` clips of each sequence.

        With a stratified density the noise levels of one clip's draws are as far apart as possible.
        """
        draws, sequences = self.draws_per_clip, len(tokens.patches)
        num_tokens = tokens.patches.shape[1]
        if tokens.clip_ids is not None:
            # Places without a clip count as one token: their losses are masked.
            num_tokens = jnp.maximum(tokens.of_clips(clips).sum(1).reshape(-1), 1)
        # Sequences are in the order (row of the batch, draw).
        strata = np.arange(sequences * clips).reshape(draws, -1, clips).swapaxes(0, 1).reshape(-1)
        timestep = self.density.sample(
            rng.stream(key, "timestep"), sequences * clips, num_tokens, jnp.asarray(strata)
        )
        weight = jnp.ones_like(timestep)
        if self.weighting is not None:
            mean = mean_weight(self.weighting, self.density, num_tokens)
            weight = self.weighting.weight(timestep) / mean
        return timestep.reshape(sequences, clips), weight.reshape(sequences, clips)


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays of all conditioners by name."""
    joined: dict[str, Any] = {}
    for part in parts:
        if taken := sorted(joined.keys() & part.keys()):
            raise UserError(f"two conditioners make an array {taken[0]!r}: rename that of your own")
        joined |= part
    return joined
