"""A video model as a function from a prompt, and optionally images, to a video."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.files import require_text
from vidgen.core.limits import LORA_SCALE, PIXELS, TOKENS
from vidgen.core.typing import Float, Latents, UInt8
from vidgen.data.image_reader import fit_image, read_image
from vidgen.data.source import BrokenClip
from vidgen.diffusion.shift import AnyShift
from vidgen.models.clip import images as clip_images
from vidgen.models.clip.model import CLIPVision
from vidgen.models.condition import PromptEncoder
from vidgen.models.dit.lora_file import load_lora
from vidgen.models.dit.model import DiT
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.lora import merge_low_rank
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.conditioning import ImageConditioning, concat_condition, first_frame
from vidgen.sampling.generate import OnProgress, denoise, seeded_noise
from vidgen.sampling.guidance import AnyGuidance
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.steppers import AnyStepper, UniPC
from vidgen.sampling.time_grid import Convention

__all__ = ["AnyImage", "Pipeline"]

AnyImage: TypeAlias = pathlib.Path | str | Image.Image | UInt8[np.ndarray, "_h _w 3"]
"""A file, a PIL image, or pixels."""


class Pipeline:
    """A video model with its VAE, encoders and sampling defaults.

    Attributes:
      model: one or two transformers, and the byte encoder if one was trained with them.
      vae: the video autoencoder.
      encode_prompts: encodes prompts as conditions of the transformer.
      size: default frames, height and width, in pixels.
      fps: frames per second.
      mesh: devices over which weights and batches are sharded.
      options: default sampling options.
      images: how images condition the model; None for a text-to-video model.
      image_encoder: CLIP encoder, for transformers that attend to image features.
    """

    def __init__(
        self,
        model: TextToVideo,
        vae: VideoVAE,
        encode_prompts: PromptEncoder,
        *,
        size: tuple[int, int, int],
        fps: float,
        mesh: Mesh,
        options: SamplingOptions | None = None,
        images: ImageConditioning | None = None,
        image_encoder: CLIPVision | None = None,
    ):
        self.model = model
        self.vae = vae
        self.encode_prompts = encode_prompts
        self.size = size
        self.fps = fps
        self.mesh = mesh
        self.options = SamplingOptions() if options is None else options
        self.images = images
        self.image_encoder = image_encoder

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        image: AnyImage | None = None,
        last_image: AnyImage | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        guidance: AnyGuidance | None = None,
        guidance_interval: tuple[float, float] | None = None,
        shift: float | AnyShift | None = None,
        stepper: AnyStepper | None = None,
        convention: Convention | None = None,
        cache: TeaCache | None = None,
        seed: int = 0,
        noise: Float[np.ndarray, "b tz hz wz z"] | None = None,
        on_progress: OnProgress | None = None,
    ) -> UInt8[np.ndarray, "t h w 3"] | UInt8[np.ndarray, "b t h w 3"]:
        """Generates a video for a prompt, or one for each of several prompts (seeds seed, seed + 1, ...).

        Arguments that are None default to `self.size` and `self.options`.

        Args:
          negative_prompt: text that guidance steers away from.
          image: the first frame of all videos, for image-to-video models; cropped to the video's aspect.
          last_image: the last frame, for models conditioned by concatenated channels.
          num_frames: 1 + 4 n for the default VAE; 1 gives an image.
          height, width: in pixels, multiples of the VAE's factor times the transformer's patch size.
          steps: of the sampler.
          guidance_scale: 1 turns guidance off.
          guidance_scale_2: scale for the low-noise transformer of two; by default `guidance_scale`.
          guidance: rule that combines the velocities with and without the prompt.
          guidance_interval: range of timesteps, from 0 (data) to 1 (noise), with guidance.
          shift: moves the sampler's timesteps towards noise; for sizes larger than those of training.
          cache: reuses the residual of the transformer's blocks in similar steps.
          stepper: integrator.
          convention: of the timesteps, as in `TimeGrid`; with a new stepper `even`, or `unipc` for `UniPC`.
          seed: the same seed gives the same video on any number of devices.
          noise: initial noise, in the shape of the latents, instead of noise from the seed.
          on_progress: called at the start of each step and of the decoding.

        Returns:
          uint8 frames `t h w 3`, with a leading batch axis if `prompt` is a sequence.

        Raises:
          UserError: the models do not support the size (the message names the nearest); an option is out of
            range; a prompt is no text; an image is missing, or the model takes none; memory is exhausted.
          PromptTooLong: names the prompt that would be truncated.
        """
        prompts = _texts([prompt] if isinstance(prompt, str) else prompt, negative_prompt)
        frames, rows, columns = self._size(num_frames, height, width)
        options = self.with_options(
            steps=steps,
            shift=shift,
            stepper=stepper,
            convention=convention,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            guidance=guidance,
            guidance_interval=guidance_interval,
            cache=cache,
        )
        with jax.set_mesh(self.mesh), _memory_errors((frames, rows, columns), len(prompts)):
            initial = self._noise(prompts, (frames, rows, columns), seed, noise)
            parts = self._image_conditions(image, last_image, initial, (frames, rows, columns))
            videos = denoise(
                self.model,
                self.vae,
                initial,
                self.encode_prompts(prompts)._replace(**parts),
                self.encode_prompts([negative_prompt] * len(prompts))._replace(**parts),
                options=options,
                on_progress=on_progress,
            )
        return videos[0] if isinstance(prompt, str) else videos

    def add_lora(
        self,
        path: pathlib.Path | str,
        *,
        scale: float = 1.0,
        expert: Literal["high_noise", "low_noise"] | None = None,
    ) -> None:
        """Merges a LoRA file (PEFT's or ComfyUI's names) into the transformer's weights.

        Args:
          scale: of the LoRA weights; a second call with the negated scale removes them, up to rounding.
          expert: which of two transformers; None is both.

        Raises:
          FileNotFoundError: there is no such file.
          WeightsError: the file holds something else, or is of another model.
          UserError: `expert` is set and the model has one transformer; `scale` is out of range.
        """
        LORA_SCALE.check(scale, "scale")
        dit = self.model.dit
        if isinstance(dit, DiT):
            if expert is not None:
                raise UserError(f"expert={expert!r}: the model has one transformer; leave it out")
            targets = [dit]
        else:
            targets = [getattr(dit, name) for name in ("high_noise", "low_noise") if expert in (None, name)]
        for target in targets:
            load_lora(target, path, scale=scale)
            merge_low_rank(target)

    def with_options(
        self,
        *,
        steps: int | None = None,
        shift: float | AnyShift | None = None,
        stepper: AnyStepper | None = None,
        convention: Convention | None = None,
        **others: Any,
    ) -> SamplingOptions:
        """The pipeline's options with arguments that are not None; `others` are `SamplingOptions` fields."""
        default = self.options
        if convention is None and stepper is not None and stepper != default.stepper:
            convention = "unipc" if isinstance(stepper, UniPC) else "even"
        grid = {"num_steps": steps, "shift": shift, "convention": convention}
        changes = {"stepper": stepper, **others}
        if others.get("guidance_scale") is not None and others.get("guidance_scale_2") is None:
            default = dataclasses.replace(default, guidance_scale_2=None)
        return dataclasses.replace(
            default,
            grid=dataclasses.replace(default.grid, **_without_none(grid)),
            **_without_none(changes),
        )

    def _size(self, *given: int | None) -> tuple[int, int, int]:
        frames, rows, columns = (d if g is None else g for g, d in zip(given, self.size, strict=True))
        return frames, rows, columns

    def _noise(
        self, prompts: Sequence[str], size: tuple[int, int, int], seed: int, noise: np.ndarray | None
    ) -> Latents:
        shape = latent_shape(self.vae.config, self.model.dit.config, size)
        asked = "num_frames={}, height={}, width={}".format(*size)
        TOKENS.check(math.prod(self.model.dit.config.token_grid(*shape[:3])), f"{asked}: tokens of the video")
        PIXELS.check(math.prod(size), asked)
        if noise is None:
            return seeded_noise(range(seed, seed + len(prompts)), shape)
        if noise.shape != (len(prompts), *shape):
            raise UserError(f"noise has the shape {noise.shape}; expected {(len(prompts), *shape)}")
        return jnp.asarray(noise, jnp.float32)

    def _image_conditions(
        self,
        image: AnyImage | None,
        last_image: AnyImage | None,
        noise: Latents,
        size: tuple[int, int, int],
    ) -> dict[str, jax.Array]:
        """Fields of `Condition` that images provide."""
        self._check_images(image, last_image)
        if image is None:
            return {}
        num_frames, count = size[0], len(noise)
        shown = [picture for picture in (image, last_image) if picture is not None]
        fitted = [pixels.to_float(jnp.asarray(_fitted(picture, size[1:]))[None, None]) for picture in shown]
        repeated = lambda x: jnp.repeat(x, count, axis=0)  # noqa: E731
        if self.images == "first":
            known_latents, known_mask = first_frame(self.vae, repeated(fitted[0]), noise)
            return {"known_latents": known_latents, "known_mask": known_mask}
        video = jnp.zeros((1, num_frames, *size[1:], 3)).at[:, :1].set(fitted[0])
        if last_image is not None:
            video = video.at[:, -1:].set(fitted[1])
        known_mask = np.arange(num_frames) == 0
        known_mask[-1] |= last_image is not None
        parts = {"concat_latents": repeated(concat_condition(self.vae, video, jnp.asarray(known_mask)))}
        if self.image_encoder is not None:
            side = self.image_encoder.config.image_size
            prepared = np.stack([clip_images.prepare(_fitted(picture), side) for picture in shown])
            features = _image_features(self.image_encoder, jnp.asarray(prepared))
            parts["image"] = jnp.tile(features, (count, 1, 1))
        return parts

    def _check_images(self, image: AnyImage | None, last_image: AnyImage | None) -> None:
        if image is None and (self.images == "beside" or last_image is not None):
            raise UserError("image is missing: the model generates videos from a first frame")
        if image is not None and self.images is None:
            raise UserError("the model makes videos of text alone; leave out image, or load another model")
        if last_image is not None and self.images != "beside":
            raise UserError("the model takes a first frame, but no last_image; leave it out")
        positions = self.model.dit.config.image_positions
        if positions and image is not None and last_image is None:
            raise UserError("last_image is missing: the model generates videos from a first and a last frame")


@contextlib.contextmanager
def _memory_errors(size: tuple[int, int, int], count: int) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "not enough memory for {} at a time of {} frames of {} x {}: sample fewer at once, a smaller or "
            "shorter video, with dtype bfloat16, or on a mesh of more devices ({})".format(
                "1 video" if count == 1 else f"{count} videos", *size, str(error).split("\n")[0][:200]
            )
        ) from error


def _texts(prompts: Sequence[str], negative_prompt: str) -> list[str]:
    if not prompts:
        raise UserError("found no prompt: give at least one")
    require_text(negative_prompt, "negative_prompt")
    return [require_text(text, "prompt") for text in prompts]


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@jax.jit
def _image_features(encoder: CLIPVision, images: jax.Array) -> jax.Array:
    return encoder(images, skip=1)


def _fitted(image: AnyImage, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an image, resized and center-cropped to `size` if it is given."""
    if isinstance(image, pathlib.Path | str):
        return _read(pathlib.Path(image), size)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return fit_image(image, size)


def _read(path: pathlib.Path, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such image")
    try:
        return read_image(path, size=size)
    except BrokenClip as error:
        raise UserError(str(error)) from error
