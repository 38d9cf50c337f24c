"""Prompts to videos with a trained model and its VAE."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import pixels
from vidgen.core.typing import Array, Bool, Float, Int, UInt8, UInt32
from vidgen.models.text.tokenizer import tokenize
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

__all__ = ["SamplingOptions", "generate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How videos are made of noise.

    Attributes:
      grid: timesteps visited.
      stepper: integrator.
      guidance_scale: 1 is no guidance, at half the cost.
      guidance: how the velocities with and without the prompt are combined.
      guidance_interval: for timesteps low < t <= high there is guidance (arXiv 2404.07724); steps that begin
        elsewhere cost half.
      cache: reuses what the transformer's blocks added in earlier steps; None computes every step.
    """

    grid: TimeGrid = TimeGrid()
    stepper: AnyStepper = DPMSolver()
    guidance_scale: float = 4.0
    guidance: AnyGuidance = ClassifierFree()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache: TeaCache | None = None

    def __post_init__(self):
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(
                f"guidance_interval={self.guidance_interval}: expected 0 <= low < high <= 1; "
                "guidance_scale=1 is no guidance"
            )


_MAX_SEED = 2**32 - 1


class _Prompts(NamedTuple):
    tokens: Int[Array, "b l"]
    mask: Bool[Array, "b l"]


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
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed={seed}: seeds are from 0 to {_MAX_SEED}")
    shape = latent_shape(vae.config, model.dit.config, size)
    max_bytes = model.text.config.max_bytes
    positive = _Prompts(*map(jnp.asarray, tokenize(prompts, max_bytes)))
    negative = _Prompts(*map(jnp.asarray, tokenize([negative_prompt] * len(prompts), max_bytes)))
    num_tokens = math.prod(model.dit.config.token_grid(*shape[:3]))
    video = _generate(
        model,
        vae,
        np.asarray(seeds, np.uint32),
        positive,
        negative,
        np.float32(options.guidance_scale),
        shape=shape,
        # The scale is an argument, for which nothing is compiled anew.
        options=dataclasses.replace(options, grid=options.grid.for_tokens(num_tokens), guidance_scale=0.0),
        guided=options.guidance_scale != 1.0,
    )
    return np.asarray(video)


@functools.partial(jax.jit, static_argnames=("shape", "options", "guided"))
def _generate(
    model: TextToVideo,
    vae: VideoVAE,
    seeds: UInt32[Array, "b"],
    positive: _Prompts,
    negative: _Prompts,
    guidance_scale: Float[Array, ""],
    *,
    shape: tuple[int, int, int, int],
    options: SamplingOptions,
    guided: bool,
) -> UInt8[Array, "b t h w 3"]:
    noise = constrain(initial_noise(seeds, shape), "batch", None, None, None, None)
    timesteps = options.grid.timesteps()[:-1]
    low, high = options.guidance_interval
    steps = (low < timesteps) & (timesteps <= high) & guided
    passes = _passes(model, steps, options)
    condition = model.condition(*positive)
    if steps.any():
        network: SteppedNetwork = Guided(
            passes=passes,
            positive=condition,
            negative=model.condition(*negative),
            guidance=options.guidance,
            scale=guidance_scale,
            steps=steps,
        )
    else:
        network = Conditional(passes=passes, condition=condition)
    latents = sample(network, noise, grid=options.grid, stepper=options.stepper)
    video = streaming.decode(vae, latents, emit=pixels.to_uint8)
    # Whole on every device, so that each process can read it.
    return constrain(video, None, None, None, None, None)


def _passes(model: TextToVideo, guided: Bool[np.ndarray, "s"], options: SamplingOptions) -> Passes:
    """The model's passes: those of every step, or those that the cache leaves."""
    if options.cache is None:
        return Direct(model.velocity)
    # What the negative prompt's tokens had added is not known where guidance begins.
    forced = guided & ~np.roll(guided, 1)
    forced[[0, -1]] = True
    told = jnp.asarray(options.grid.told()[:-1])
    return CachedPasses(model=model, computed=options.cache.computed(model.dit, told, forced))
