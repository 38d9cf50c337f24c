"""Built-in conditioners: known first frame, frames as channels, image features, prompts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.limits import PROBABILITY, check_fields
from vidgen.core.streams import CONCAT_LATENTS, IMAGE, TEXT, Stream
from vidgen.core.tokens import patchify
from vidgen.core.typing import Array, Bool, Float, Latents, Video
from vidgen.models.clip import images as clip_images
from vidgen.models.clip.model import CLIPVision
from vidgen.models.dit.config import DiTConfig
from vidgen.models.prompt_encoder import PromptEncoder
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.sampling.conditioning import Condition, Target, TrainingClips, TrainingConditioner
from vidgen.sampling.request import Request, fitted_pixels

__all__ = [
    "AnyConditioner",
    "ClipImages",
    "ConcatFrames",
    "FirstFrame",
    "Prompts",
    "concat_latents",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """The first latent frame is known: an image in sampling, in training that of a random share of clips.

    Attributes:
      probability: share of the clips of training whose first frame is known.
    """

    kind: Literal["first_frame"] = "first_frame"
    probability: Annotated[float, PROBABILITY] = 1.0

    fields: ClassVar[frozenset[str]] = frozenset({"image"})
    provides: ClassVar[frozenset[str]] = frozenset()
    key_name: ClassVar[str] = "image"
    needs_video: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None:
        if dit.patch_size[0] != 1:
            raise UserError(
                f"first_frame: a patch of dit.patch_size={dit.patch_size} is more than one latent frame; set "
                "the first number to 1"
            )

    def host(self, captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        return {}

    def host_spec(self, sequences: int, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {}

    def observe(self, clips: TrainingClips, key: Array) -> Condition:
        tokens, count = clips.tokens, len(clips.tokens.patches)
        time = jnp.broadcast_to(tokens.positions[..., 0], (count, tokens.patches.shape[1]))
        of_clips = tokens.of_clips(clips.clips)
        # An image alone is predicted: with its only frame known, nothing would be left.
        is_video = jnp.where(of_clips, time[..., None], 0).max(1) > 0
        chosen = is_video & jax.random.bernoulli(key, self.probability, is_video.shape)
        known_mask = (of_clips & chosen[:, None]).any(-1) & (time == 0)
        return Condition(known_patches=tokens.patches, known_mask=known_mask)

    def from_request(self, request: Request, target: Target) -> Condition:
        if request.image is None:
            return Condition()
        image = _pixels(request.image, target)
        known_patches, known_mask = _first_frame(target.vae, image, target.model.dit.config, target.size)
        return _repeated(Condition(known_patches=known_patches, known_mask=known_mask), target.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatFrames:
    """Wan's image to video: a mask and latents of the known frames as channels beside the noisy latents."""

    kind: Literal["concat_frames"] = "concat_frames"

    fields: ClassVar[frozenset[str]] = frozenset({"image", "last_image"})
    provides: ClassVar[frozenset[str]] = frozenset({CONCAT_LATENTS})
    key_name: ClassVar[str] = "image"
    needs_video: ClassVar[bool] = True

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None:
        expected = vae.temporal_factor + vae.latent_channels
        if dit.concat_channels != expected:
            raise UserError(
                f"dit.in_channels={dit.in_channels}: concat_frames makes {expected} channels; "
                f"set in_channels={vae.latent_channels + expected} and out_channels={vae.latent_channels}"
            )

    def host(self, captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        return {}

    def host_spec(self, sequences: int, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {}

    def observe(self, clips: TrainingClips, key: Array) -> Condition:
        assert clips.vae is not None and clips.video is not None
        channels = concat_latents(clips.vae, clips.video, jnp.arange(clips.video.shape[1]) == 0)
        features = patchify(jax.lax.stop_gradient(channels), clips.model.dit.config.patch_size)
        return Condition({CONCAT_LATENTS: Stream(features)})

    def from_request(self, request: Request, target: Target) -> Condition:
        if request.image is None:
            raise UserError("image is missing: the model generates videos from a first frame")
        num_frames, height, width = target.size
        video = jnp.zeros((1, num_frames, height, width, 3)).at[:, :1].set(_pixels(request.image, target))
        known_mask = np.arange(num_frames) == 0
        if request.last_image is not None:
            video = video.at[:, -1:].set(_pixels(request.last_image, target))
            known_mask[-1] = True
        channels = concat_latents(target.vae, video, jnp.asarray(known_mask))
        features = patchify(channels, target.model.dit.config.patch_size)
        return _repeated(Condition({CONCAT_LATENTS: Stream(features)}), target.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipImages:
    """Features of the first frame, or of the first and the last, from CLIP's image encoder."""

    encoder: CLIPVision

    fields: ClassVar[frozenset[str]] = frozenset({"image", "last_image"})
    provides: ClassVar[frozenset[str]] = frozenset({IMAGE})

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None: ...

    def from_request(self, request: Request, target: Target) -> Condition:
        shown = [image for image in (request.image, request.last_image) if image is not None]
        if not shown:
            raise UserError("image is missing: the model attends to features of an image")
        if target.model.dit.config.image_positions and len(shown) < 2:
            raise UserError("last_image is missing: the model generates videos from a first and a last frame")
        side = self.encoder.config.image_size
        prepared = np.stack([clip_images.prepare(fitted_pixels(image), side) for image in shown])
        features = _image_features(self.encoder, jnp.asarray(prepared))
        return Condition({IMAGE: Stream(jnp.tile(features, (target.count, 1, 1)))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Text features of the prompts, and of the negative prompt."""

    encode: PromptEncoder

    fields: ClassVar[frozenset[str]] = frozenset({"prompt", "negative_prompt"})
    provides: ClassVar[frozenset[str]] = frozenset({TEXT})

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None: ...

    def from_request(self, request: Request, target: Target) -> Condition:
        return Condition(
            {TEXT: self.encode(request.prompts)},
            negative={TEXT: self.encode([request.negative_prompt] * target.count)},
        )


AnyConditioner: TypeAlias = FirstFrame | ConcatFrames | TrainingConditioner
"""Conditioners of `TextToVideoTask.conditioners`."""


@jax.jit
def concat_latents(vae: VideoVAE, video: Video, known_mask: Bool[Array, "t"]) -> Latents:
    """Channels that Wan's image-to-video models concatenate to the noise: a mask and latents of known frames.

    Args:
      video: in [-1, 1]; unknown frames are replaced by 0 (grey).
      known_mask: true for known frames.

    Returns:
      `temporal_factor` mask channels, one per frame of a latent frame (the first frame fills all channels of
      the first latent frame), then the channels of the latents, float32.
    """
    factor = vae.config.temporal_factor
    shown = jnp.where(known_mask[None, :, None, None, None], video, 0.0)
    latents = streaming.encode(vae, shown)
    b, t, h, w, _ = latents.shape
    mask = jnp.concatenate([jnp.repeat(known_mask[:1], factor), known_mask[1:]]).reshape(t, factor)
    mask = jnp.broadcast_to(mask[None, :, None, None].astype(latents.dtype), (b, t, h, w, factor))
    return jnp.concatenate([mask, latents], axis=-1)


@functools.partial(jax.jit, static_argnames=("dit", "size"))
def _first_frame(
    vae: VideoVAE, image: Video, dit: DiTConfig, size: tuple[int, int, int]
) -> tuple[Float[Array, "b s p"], Bool[Array, "b s"]]:
    """Patches of the image's latents followed by zeros, and the mask of the first latent frame."""
    frame = patchify(vae.encode(image), dit.patch_size)
    num_tokens = vae.config.latent_shape(*size)[0] * frame.shape[1]
    patches = jnp.pad(frame, ((0, 0), (0, num_tokens - frame.shape[1]), (0, 0)))
    return patches, jnp.broadcast_to(jnp.arange(num_tokens)[None] < frame.shape[1], patches.shape[:2])


@jax.jit
def _image_features(encoder: CLIPVision, images: Array) -> Array:
    return encoder(images, skip=1)


def _pixels(image: Any, target: Target) -> Video:
    """One frame of one video, resized and center-cropped to the videos' size."""
    return pixels.to_float(jnp.asarray(fitted_pixels(image, target.size[1:]))[None, None])


def _repeated(condition: Condition, count: int) -> Condition:
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), condition)
