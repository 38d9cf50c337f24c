"""Prompts to videos with a trained model and its VAE."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Latents, UInt8, UInt32
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.condition import Condition, with_given
from vidgen.models.dit.experts import TwoExperts
from vidgen.models.dit.model import DiT
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import constrain
from vidgen.sampling.caching import CachedPasses, TeaCache
from vidgen.sampling.guidance import AnyGuidance, ClassifierFree
from vidgen.sampling.network import Conditional, Direct, Guided, Passes, SteppedNetwork
from vidgen.sampling.sampler import initial_noise, sample
from vidgen.sampling.steppers import AnyStepper, DPMSolver
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["SamplingOptions", "denoise", "denoise_on_device", "generate", "seeded_noise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How videos are made of noise.

    Attributes:
      grid: timesteps visited.
      stepper: integrator.
      guidance_scale: 1 is no guidance, at half the cost.
      guidance_scale_2: of the transformer for little noise, for models with two; None is the same.
      guidance: how the velocities with and without the prompt are combined.
      guidance_interval: for timesteps low < t <= high there is guidance (arXiv 2404.07724); steps that begin
        elsewhere cost half.
      cache: reuses what the transformer's blocks added in earlier steps; None computes every step.
    """

    grid: TimeGrid = TimeGrid()
    stepper: AnyStepper = DPMSolver()
    guidance_scale: float = 4.0
    guidance_scale_2: float | None = None
    guidance: AnyGuidance = ClassifierFree()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache: TeaCache | None = None

    def __post_init__(self):
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise UserError(
                f"guidance_interval={self.guidance_interval}: expected 0 <= low < high <= 1; "
                "guidance_scale=1 is no guidance"
            )


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
      UserError: a size that the models do not take, a seed that is no uint32, numbers of prompts and seeds
        that differ.
      PromptTooLong: a prompt is longer than the text encoder takes.
    """
    if not prompts or len(prompts) != len(seeds):
        raise UserError(
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
      UserError: a seed that is no uint32.
    """
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise UserError(f"seed={seed}: seeds are from 0 to {_MAX_SEED}")
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

    Raises:
      UserError: an option that the model has no use for.
    """
    return np.asarray(denoise_on_device(model, vae, noise, positive, negative, options=options))


def denoise_on_device(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition,
    *,
    options: SamplingOptions = SamplingOptions(),
) -> UInt8[Array, "b t h w 3"]:
    """`denoise` as one program on the devices, which may be a part of another."""
    experts = isinstance(model.dit, TwoExperts)
    if options.cache is not None and experts:
        raise UserError("cache: a model with two transformers has none; leave it out")
    if options.guidance_scale_2 is not None and not experts:
        raise UserError("guidance_scale_2 is for models with two transformers; leave it out")
    scale = options.guidance_scale
    second = scale if options.guidance_scale_2 is None else options.guidance_scale_2
    num_tokens = math.prod(model.dit.config.token_grid(*noise.shape[1:4]))
    guided = (scale, second) != (1.0, 1.0)
    return _denoise(
        model,
        vae,
        noise,
        positive,
        negative if guided else None,
        np.array([scale, second], np.float32),
        # The scales are an argument, for which nothing is compiled anew.
        options=dataclasses.replace(
            options, grid=options.grid.for_tokens(num_tokens), guidance_scale=0.0, guidance_scale_2=None
        ),
    )


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds: UInt32[Array, "b"], *, shape: tuple[int, int, int, int]) -> Latents:
    return constrain(initial_noise(seeds, shape), "batch", None, None, None, None)


@functools.partial(jax.jit, static_argnames="options")
def _denoise(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition | None,
    scales: Float[Array, "2"],
    *,
    options: SamplingOptions,
) -> UInt8[Array, "b t h w 3"]:
    timesteps = options.grid.timesteps()[:-1]
    low, high = options.guidance_interval
    steps = (low < timesteps) & (timesteps <= high) & (negative is not None)
    passes = _passes(model, steps, options)
    if steps.any():
        network: SteppedNetwork = Guided(
            passes=passes,
            positive=positive,
            negative=negative,
            guidance=options.guidance,
            scale=_scale_by_step(model, scales, options.grid),
            steps=steps,
        )
    else:
        network = Conditional(passes=passes, condition=positive)
    latents = sample(network, noise, grid=options.grid, stepper=options.stepper)
    latents = with_given(latents, positive)
    video = streaming.decode(vae, latents, emit=pixels.to_uint8)
    # Whole on every device, so that each process can read it.
    return constrain(video, None, None, None, None, None)


def _scale_by_step(model: TextToVideo, scales: Float[Array, "2"], grid: TimeGrid) -> Float[Array, "s"]:
    """The first scale; below the boundary of two transformers the second."""
    boundary = model.dit.boundary if isinstance(model.dit, TwoExperts) else 0.0
    return jnp.where(jnp.asarray(grid.told()[:-1] >= np.float32(boundary)), scales[0], scales[1])


def _passes(model: TextToVideo, guided: Bool[np.ndarray, "s"], options: SamplingOptions) -> Passes:
    """The model's passes: those of every step, or those that the cache leaves."""
    if options.cache is None:
        return Direct(model.velocity)
    # What the negative prompt's tokens had added is not known where guidance begins.
    forced = guided & ~np.roll(guided, 1)
    forced[[0, -1]] = True
    told = jnp.asarray(options.grid.told()[:-1])
    assert isinstance(model.dit, DiT)
    return CachedPasses(model=model, computed=options.cache.computed(model.dit, told, forced))
