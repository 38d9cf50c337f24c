"""Trains the DiT and its text encoder by rectified flow on the latents of a frozen VAE."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core import pixels, rng
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Int, Latents, Metrics, Video
from vidgen.data.buckets import training_clips
from vidgen.data.loader import Loader
from vidgen.data.packing import PackedLoader
from vidgen.diffusion.rectified_flow import packed_velocity_loss, velocity_loss
from vidgen.diffusion.timesteps import AnyDensity, LogitNormal
from vidgen.diffusion.weighting import AnyWeighting, mean_weight
from vidgen.models.condition import Condition, PackedCondition, packed_condition
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import MATRICES
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text.tokenizer import tokenize
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.lora import LoRAOptions, add_low_rank
from vidgen.nn.variables import Constant, freeze
from vidgen.parallel import processes
from vidgen.parallel.processes import check_tokens
from vidgen.sampling.conditioning import ImageConditioning, concat_condition, infer_image_conditioning
from vidgen.sampling.options import SamplingOptions
from vidgen.train.batch_spec import BatchSpec, empty_batch, spec_of
from vidgen.train.check_sizes import check_preview, check_videos
from vidgen.train.evaluator import Evaluator, Previews
from vidgen.train.long_captions import LongCaptions
from vidgen.train.options import RunOptions
from vidgen.train.packed_clips import pack_rows
from vidgen.train.packed_data import check_latents, packed_loader
from vidgen.train.task import Context, Frozen, Phase, Total
from vidgen.train.text_features import TextFeatures
from vidgen.train.vae_folder import has_vae, load_vae, save_vae, vae_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoTask:
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
      images: how a transformer for image-to-video receives the first frame of a clip; None passes none.
      image_share: share of the clips whose first frame is known.
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
    images: ImageConditioning | None = None
    image_share: float = 1.0
    draws_per_clip: int = 1
    sampling: SamplingOptions = SamplingOptions()

    scores: ClassVar[Literal["reconstructions", "prompts"]] = "prompts"

    def __post_init__(self):
        if self.dit.image_dim is not None:
            raise UserError(
                "dit.image_dim: training supports no transformers with image features; set it to None"
            )
        if not 0 <= self.image_share <= 1 or (self.images == "beside" and self.image_share != 1):
            raise UserError(
                f'image_share is {self.image_share}; expected a share, and 1 with images="beside", '
                "whose transformers always have an image"
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
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(loss=self.loss),)

    @property
    def network(self) -> tuple[str, DiTConfig]:
        return "dit", self.dit

    def inference_model(self, model: TextToVideo) -> TextToVideo:
        return model

    def frozen(self) -> dict[str, Frozen]:
        build = lambda: VideoVAE(self.vae_config(), rngs=nnx.Rngs(0))  # noqa: E731
        return {"vae": Frozen(source=self.vae, load=lambda: load_vae(self.vae), build=build)}

    def vae_config(self) -> VAEConfig:
        return vae_config(self.vae)

    def in_workdir(self, workdir: pathlib.Path) -> "TextToVideoTask":
        return dataclasses.replace(self, vae=str(workdir)) if has_vae(workdir) else self

    def check(self, data: Any, run: RunOptions, mesh: Mesh) -> None:
        if data.packing is not None:
            check_preview(data, self.check_size)
            check_latents(data, self.dit, self.vae, self.images, run, mesh)
            return

        def check_size(*size: int) -> None:
            self.check_size(*size)
            check_tokens(self.num_tokens(*size), mesh)

        check_videos(data, run, mesh, check_size)

    def loader(self, data: Any) -> Callable[..., Loader | PackedLoader]:
        if data.packing is not None:
            return packed_loader(data, self.dit)
        return functools.partial(Loader, training_clips(data))

    def evaluators(self, previews: Previews) -> Sequence[Evaluator]:
        return previews.samples(self)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises UserError for a clip size that the VAE or the transformer does not support."""
        vae = vae_config(self.vae)
        latent_shape(vae, self.dit, (num_frames, height, width))
        expected = infer_image_conditioning(self.dit, vae.latent_channels, vae.temporal_factor)
        if (expected == "beside") != (self.images == "beside"):
            raise UserError(
                f"dit.in_channels={self.dit.in_channels} is for images={expected!r}, found {self.images!r}"
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

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if self.text_encoder is None:
            self._long_captions.note(batch)
        if "rows" not in batch:
            return {"video": batch["video"], **self._text_arrays(batch["caption"])}
        packed = pack_rows(
            batch["rows"],
            self.dit,
            tokens_per_row=batch["tokens_per_row"],
            clips_per_row=batch["clips_per_row"],
        )
        arrays = {name: getattr(packed, name) for name in ("patches", "positions", "segment_ids")}
        rows = len(packed.captions)
        for name, x in self._text_arrays([caption for row in packed.captions for caption in row]).items():
            shared_by_row = name == "empty_text"
            arrays[name] = x[:rows, None] if shared_by_row else x.reshape(rows, -1, *x.shape[1:])
        return arrays

    @functools.cached_property
    def _long_captions(self) -> LongCaptions:
        return LongCaptions(self.text.max_bytes)

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        spec = spec_of(dataclasses.replace(self, text_encoder=None).arrays(empty_batch(data)), batch_size)
        if self.text_encoder is None:
            return spec
        del spec["mask"]
        captions = spec.pop("tokens").shape[:-1]
        of_caption = (self.text_encoder.max_tokens, self.dit.text_dim)
        # A packed batch has one empty caption per row.
        shapes = {
            "text": (*captions, *of_caption),
            "empty_text": (batch_size, *(1 for _ in captions[1:]), *of_caption),
        }
        return spec | {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(self.text_encoder.dtype))
            for name, shape in shapes.items()
        }

    def _text_arrays(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Inputs of the text condition, one per caption."""
        if self.text_encoder is None:
            tokens, mask = tokenize(captions, self.text.max_bytes, truncate=True)
            return {"tokens": tokens, "mask": mask}
        unique = list(dict.fromkeys(["", *captions]))
        features = self.text_encoder.features(unique)
        text = features[[unique.index(caption) for caption in captions]]
        return {"text": text, "empty_text": np.broadcast_to(features[:1], text.shape)}

    def loss(self, context: Context[TextToVideo, Mapping[str, Array]]) -> tuple[Float[Array, ""], Metrics]:
        """Velocity loss of a batch of videos or of packed rows."""
        model, batch, key = context.model, context.batch, context.key
        if "patches" in batch:
            return self._packed_loss(model, batch, key)
        vae = context.frozen["vae"]
        video = pixels.to_float(batch["video"])
        clean = jax.lax.stop_gradient(vae.encode(video))
        condition = self._condition(model, batch, rng.stream(key, "caption"))
        condition = self._with_image(condition, vae, video, clean, rng.stream(key, "image"))
        # The draws of a clip are adjacent: in a sharded batch, no clip leaves its device.
        clean, condition = jax.tree.map(
            lambda x: jnp.repeat(x, self.draws_per_clip, axis=0), (clean, condition)
        )
        noise = jax.random.normal(rng.stream(key, "noise"), clean.shape)
        num_tokens = math.prod(self.dit.token_grid(*clean.shape[1:4]))
        timestep, weight = self._timesteps(key, len(clean), num_tokens)
        loss_mask = None if condition.known_mask is None else ~condition.known_mask
        network = lambda x, t: model.velocity(x, t, condition)  # noqa: E731
        losses = velocity_loss(network, clean, noise, timestep, loss_mask)
        return (losses * weight).mean(), {"latent_std": clean.std()}

    def finish(
        self,
        model: TextToVideo,
        *,
        step: int,
        workdir: pathlib.Path,
        open_clips: Callable[[], Any] | None,
        mesh: Mesh,
    ) -> None:
        """Does nothing: the checkpoints hold what sampling needs."""

    def _condition(self, model: TextToVideo, batch: Mapping[str, Array], key: Array) -> Condition:
        """Text condition; dropped captions are replaced by the empty one."""
        if self.text_encoder is None:
            return model.condition(*self._drop_captions(batch["tokens"], batch["mask"], key))
        return Condition(self._drop_features(batch, key))

    def _packed_condition(
        self, model: TextToVideo, batch: Mapping[str, Array], key: Array
    ) -> PackedCondition:
        """Text condition of packed rows; each clip's caption is dropped independently."""
        if self.text_encoder is None:
            shape = batch["tokens"].shape
            tokens, mask = (batch[name].reshape(-1, shape[-1]) for name in ("tokens", "mask"))
            tokens, mask = self._drop_captions(tokens, mask, key)
            return model.packed_condition(tokens.reshape(shape), mask.reshape(shape))
        text = self._drop_features(batch, key)
        return packed_condition(text, jnp.ones(text.shape[:-1], bool))

    def _drop_features(self, batch: Mapping[str, Array], key: Array) -> Float[Array, "*b l e"]:
        text = batch["text"]
        drop = jax.random.bernoulli(key, self.caption_dropout, (*text.shape[:-2], 1, 1))
        return jnp.where(drop, batch["empty_text"], text).astype(jnp.float32)

    def _with_image(
        self, condition: Condition, vae: VideoVAE, video: Video, clean: Latents, key: Array
    ) -> Condition:
        """Condition with the first frame: channels for all clips, or known latents for a random share."""
        if self.images is None or (clean.shape[1] == 1 and self.images == "first"):
            return condition
        if self.images == "beside":
            channels = concat_condition(vae, video, jnp.arange(video.shape[1]) == 0)
            return condition._replace(concat_latents=jax.lax.stop_gradient(channels))
        chosen = jax.random.bernoulli(key, self.image_share, (len(clean), 1, 1, 1))
        first = (jnp.arange(clean.shape[1]) == 0)[None, :, None, None]
        known_mask = jnp.broadcast_to(chosen & first, clean.shape[:4])
        return condition._replace(known_latents=clean, known_mask=known_mask)

    def _timesteps(
        self, key: Array, count: int, num_tokens: int | Int[Array, "b"], places: int = 1
    ) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """Timesteps, and loss weights, of clips with `num_tokens` tokens each.

        Clips are in the order (packed row, draw, place in the row), with `places` per row. With a stratified
        density the noise levels of one clip's draws are as far apart as possible.
        """
        draws = self.draws_per_clip
        strata = np.arange(count).reshape(draws, -1, places).swapaxes(0, 1).reshape(-1)
        timestep = self.density.sample(rng.stream(key, "timestep"), count, num_tokens, jnp.asarray(strata))
        if self.weighting is None:
            return timestep, jnp.ones_like(timestep)
        mean = mean_weight(self.weighting, self.density, num_tokens)
        return timestep, self.weighting.weight(timestep) / mean

    def _packed_loss(
        self, model: TextToVideo, batch: Mapping[str, Array], key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over clips, however many a packed row has."""
        condition = self._packed_condition(model, batch, rng.stream(key, "caption"))
        clean, positions, segment_ids, condition = jax.tree.map(
            lambda x: jnp.repeat(x, self.draws_per_clip, axis=0),
            (batch["patches"].astype(jnp.float32), batch["positions"], batch["segment_ids"], condition),
        )
        noise = jax.random.normal(rng.stream(key, "noise"), clean.shape)
        places = batch["text" if "text" in batch else "tokens"].shape[1]
        clips = jnp.arange(1, places + 1)
        num_tokens = (segment_ids[:, :, None] == clips[None, None]).sum(1).reshape(-1)
        # Places without a clip count as one token: their losses are masked.
        timestep, weight = self._timesteps(key, num_tokens.size, jnp.maximum(num_tokens, 1), places)
        losses, present = packed_velocity_loss(
            lambda x, t: model.packed_velocity(x, t, condition, positions=positions, segment_ids=segment_ids),
            clean,
            noise,
            timestep.reshape(-1, places),
            segment_ids,
        )
        is_token = segment_ids > 0
        metrics = {
            "latent_std": clean.std(where=is_token[..., None]),
            "fill": is_token.mean(),
            "clips": Total(present.sum() / self.draws_per_clip),
        }
        return (losses * weight.reshape(losses.shape)).sum() / jnp.maximum(present.sum(), 1), metrics

    def _drop_captions(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"], key: Array
    ) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
        empty_tokens, empty_mask = tokenize([""], self.text.max_bytes)
        drop = jax.random.bernoulli(key, self.caption_dropout, (len(tokens), 1))
        return jnp.where(drop, empty_tokens, tokens), jnp.where(drop, empty_mask, mask)
