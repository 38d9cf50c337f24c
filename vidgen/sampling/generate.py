"""Prompts to videos with a trained model and its VAE."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from vidgen.core import pixels
from vidgen.core.typing import Array, Float, Latents, UInt8, UInt32
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.condition import Condition, with_given
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import constrain
from vidgen.sampling.guidance import classifier_free_guidance
from vidgen.sampling.sampler import initial_noise, sample
from vidgen.sampling.steppers import AnyStepper, DPMSolver
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["SamplingOptions", "denoise", "generate", "seeded_noise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How videos are made of noise.

    Attributes:
      grid: timesteps visited.
      stepper: integrator.
      guidance_scale: of classifier-free guidance; 1 is none, at half the cost.
    """

    grid: TimeGrid = TimeGrid()
    stepper: AnyStepper = DPMSolver()
    guidance_scale: float = 4.0


_MAX_SEED = 2**32 - 1


def generate(
    model: TextToVideo,
    vae: VideoVAE,
    prompts: Sequence[str],
    *,
    size: tuple[int, int, int],
    seeds: Sequence[int],
    negative_prompt: str = "",
    options: SamplingOptions = SamplingOptions(),
) -> UInt8[np.ndarray, "b t h w 3"]:
    """One video per prompt; a video depends on its prompt and seed, not on the others or the devices.

    Args:
      model: with a text encoder of its own.
      size: frames, height and width in pixels.
      seeds: one per prompt.
      negative_prompt: what guidance leads away from.

    Raises:
      ValueError: a size that the models do not take, a seed that is no uint32, numbers of prompts and seeds
        that differ.
      PromptTooLong: a prompt is longer than the text encoder takes.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"found {len(prompts)} prompts and {len(seeds)} seeds: give at least one, and as many of each"
        )
    encode = BytePrompts(model)
    positive, negative = encode(prompts), encode([negative_prompt] * len(prompts))
    noise = seeded_noise(seeds, latent_shape(vae.config, model.dit.config, size))
    return denoise(model, vae, noise, positive, negative, options=options)


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int, int]) -> Latents:
    """Noise of one clip per seed, laid over the mesh in context.

    Args:
      shape: of a clip's latents.

    Raises:
      ValueError: a seed that is no uint32.
    """
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed={seed}: seeds are from 0 to {_MAX_SEED}")
    return _noise(np.asarray(seeds, np.uint32), shape=shape)


def denoise(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition,
    *,
    options: SamplingOptions = SamplingOptions(),
) -> UInt8[np.ndarray, "b t h w 3"]:
    """Videos out of noise.

    Args:
      positive: conditions of the clips.
      negative: what guidance leads away from; not looked at without guidance.
    """
    guided = options.guidance_scale != 1.0
    video = _denoise(
        model,
        vae,
        noise,
        positive,
        negative if guided else None,
        np.float32(options.guidance_scale),
        grid=options.grid,
        stepper=options.stepper,
    )
    return np.asarray(video)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds: UInt32[Array, "b"], *, shape: tuple[int, int, int, int]) -> Latents:
    return constrain(initial_noise(seeds, shape), "batch", None, None, None, None)


@functools.partial(jax.jit, static_argnames=("grid", "stepper"))
def _denoise(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition | None,
    guidance_scale: Float[Array, ""],
    *,
    grid: TimeGrid,
    stepper: AnyStepper,
) -> UInt8[Array, "b t h w 3"]:
    if negative is not None:
        network = classifier_free_guidance(model.velocity, positive, negative, guidance_scale)
    else:
        network = functools.partial(model.velocity, condition=positive)
    latents = with_given(sample(network, noise, grid=grid, stepper=stepper), positive)
    video = streaming.decode(vae, latents, emit=pixels.to_uint8)
    # Whole on every device, so that each process can read it.
    return constrain(video, None, None, None, None, None)
