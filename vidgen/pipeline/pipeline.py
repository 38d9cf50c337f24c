"""A video model as a function from a prompt, and optionally images, to a video."""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidgen.core.errors import UserError
from vidgen.core.limits import LORA_SCALE, PIXELS, TOKENS
from vidgen.core.typing import Latents, UInt8
from vidgen.models.dit.lora_file import load_lora
from vidgen.models.dit.model import DiT
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.lora import merge_low_rank
from vidgen.sampling.conditioning import Condition, Conditioner, Target, check_conditioners, merged
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.programs import Programs, make_programs, seeded_noise
from vidgen.sampling.request import Request

__all__ = ["Pipeline", "Progress"]


class Progress(NamedTuple):
    """Progress of sampling.

    Attributes:
      stage: the stage that begins, or `done`. The first step and the decoding compile their programs before
        they run.
      step: number of finished steps.
      num_steps: number of all steps.
      videos: uint8 frames `b t h w 3`: at `done` the videos; at a step the preview that was asked for,
        decoded from the prediction of the clean latents.
    """

    stage: Literal["step", "decoding", "done"]
    step: int
    num_steps: int
    videos: UInt8[np.ndarray, "b t h w 3"] | None = None


class Pipeline:
    """A video model with its VAE, conditioners and sampling defaults.

    Attributes:
      model: one or two transformers, and the byte encoder if one was trained with them.
      vae: the video autoencoder.
      conditioners: make the conditions of the transformer from a request; one makes the stream `text`.
      size: default frames, height and width, in pixels.
      fps: frames per second.
      mesh: devices over which weights and batches are sharded.
      options: default sampling options.
    """

    def __init__(
        self,
        model: TextToVideo,
        vae: VideoVAE,
        conditioners: Sequence[Conditioner],
        *,
        size: tuple[int, int, int],
        fps: float,
        mesh: Mesh,
        options: SamplingOptions | None = None,
    ):
        """Stores the arguments.

        Raises:
          UserError: the conditioners do not make what the transformer takes.
        """
        check_conditioners(conditioners, model.dit.config, vae.config)
        self.model = model
        self.vae = vae
        self.conditioners = tuple(conditioners)
        self.size = size
        self.fps = fps
        self.mesh = mesh
        self.options = SamplingOptions() if options is None else options

    def __call__(
        self, prompt: str | Sequence[str], **fields: Any
    ) -> UInt8[np.ndarray, "t h w 3"] | UInt8[np.ndarray, "b t h w 3"]:
        """Generates a video for a prompt, or one for each of several prompts.

        Args:
          fields: other fields of `Request`: size, images, seed and sampling options.

        Returns:
          uint8 frames `t h w 3`, with a leading batch axis if `prompt` is a sequence.

        Raises:
          UserError: the models do not support the size (the message names the nearest); an option is out of
            range; a prompt is no text; an image is missing, or the model takes none; memory is exhausted.
          PromptTooLong: names the prompt that would be truncated.
        """
        for event in self.stream(Request(prompt=prompt, **fields), progress=False):
            if event.videos is not None:
                return event.videos[0] if isinstance(prompt, str) else event.videos
        raise AssertionError("the stream ends with the videos")

    def stream(
        self, request: Request, *, progress: bool = True, preview_every: int | None = None
    ) -> Iterator[Progress]:
        """Generates videos step by step; the last event has them. Errors are those of a call.

        Closing the iterator, or no longer asking it, cancels the rest.

        Args:
          progress: yields an event at the start of each step and of the decoding, when the step before has
            finished; without it steps are enqueued without waiting, and the only event is the last.
          preview_every: steps between previews, each of which costs a decoding; None makes none.
        """
        if preview_every is not None and (not isinstance(preview_every, int) or preview_every < 1):
            raise UserError(f"preview_every={preview_every}: expected a number of steps from 1, or None")
        size = request.size(self.size)
        options = request.options(self.options)
        with jax.set_mesh(self.mesh), _memory_errors(size, len(request.prompts)):
            noise = self._noise(request, size)
            programs = make_programs(
                self.model.dit,
                self.vae,
                noise,
                self._condition(request, Target(self.model, self.vae, size, len(noise), self.mesh)),
                options=options,
                keep_clean=preview_every is not None,
            )
            state = programs.init()
        for step in range(programs.num_steps):
            if progress:
                jax.block_until_ready(state)
                preview = None
                if (
                    preview_every is not None
                    and step
                    and step % preview_every == 0
                    and state.clean is not None
                ):
                    preview = self._decoded(programs, state.clean, size)
                yield Progress("step", step, programs.num_steps, preview)
            with jax.set_mesh(self.mesh), _memory_errors(size, len(noise)):
                state = programs.step(state, np.int32(step))
        if progress:
            jax.block_until_ready(state)
            yield Progress("decoding", programs.num_steps, programs.num_steps)
        videos = self._decoded(programs, state.latents, size)
        yield Progress("done", programs.num_steps, programs.num_steps, videos)

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

    def _noise(self, request: Request, size: tuple[int, int, int]) -> Latents:
        shape = latent_shape(self.vae.config, self.model.dit.config, size)
        asked = "num_frames={}, height={}, width={}".format(*size)
        TOKENS.check(math.prod(self.model.dit.config.token_grid(*shape[:3])), f"{asked}: tokens of the video")
        PIXELS.check(math.prod(size), asked)
        count = len(request.prompts)
        if request.noise is None:
            return seeded_noise(range(request.seed, request.seed + count), shape)
        if request.noise.shape != (count, *shape):
            raise UserError(f"noise has the shape {request.noise.shape}; expected {(count, *shape)}")
        if not np.isfinite(request.noise).all():
            raise UserError("noise has values that are not finite")
        return jnp.asarray(request.noise, jnp.float32)

    def _condition(self, request: Request, target: Target) -> Condition:
        read = frozenset().union(*(conditioner.fields for conditioner in self.conditioners))
        for name in ("image", "last_image"):
            if getattr(request, name) is not None and name not in read:
                raise UserError(f"the model takes no {name}; leave it out, or load another model")
        for name in request.extras:
            if name not in read:
                raise UserError(f"extras: no conditioner of the model reads {name!r}; leave it out")
        if request.last_image is not None and request.image is None:
            raise UserError("image is missing: the model generates videos from a first and a last frame")
        return merged([conditioner.from_request(request, target) for conditioner in self.conditioners])

    def _decoded(self, programs: Programs, patches: jax.Array, size: tuple[int, int, int]) -> np.ndarray:
        with jax.set_mesh(self.mesh), _memory_errors(size, len(patches)):
            return np.asarray(programs.decode(patches))


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
