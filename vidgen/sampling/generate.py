"""Prompts to videos with a trained model and its VAE."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.limits import SAMPLER_STEPS, SEED
from vidgen.core.typing import Array, Bool, Float, Int, Latents, UInt8, UInt32
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.condition import Condition, with_known
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.model import DiT
from vidgen.models.text_to_video import TextToVideo, latent_shape
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import constrain
from vidgen.sampling import sampler
from vidgen.sampling.caching import CachedDenoiser, TeaCache
from vidgen.sampling.guidance import AnyGuidance
from vidgen.sampling.network import Conditional, Guided, StatefulNetwork, UncachedDenoiser
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.sampler import SamplerState, Timesteps, initial_noise
from vidgen.sampling.steppers import AnyStepper

__all__ = ["OnProgress", "Progress", "denoise", "denoise_on_device", "generate", "seeded_noise"]


class Progress(NamedTuple):
    """How far sampling is.

    Attributes:
      stage: what begins now. The first step and the decoding compile their programs before they run.
      done: steps that are computed.
      count: of all steps.
    """

    stage: Literal["step", "decoding"]
    done: int
    count: int


OnProgress: TypeAlias = Callable[[Progress], None]


_DEFAULT = SamplingOptions()
_MAX_STEPS = int(SAMPLER_STEPS.high)
"""What differs from step to step is padded to this length, so that one program takes any number of steps."""


def generate(
    model: TextToVideo,
    vae: VideoVAE,
    prompts: Sequence[str],
    *,
    size: tuple[int, int, int],
    seeds: Sequence[int],
    negative_prompt: str = "",
    options: SamplingOptions = _DEFAULT,
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
        SEED.check(seed, "seed")
    return _noise(np.asarray(seeds, np.uint32), shape=shape)


def denoise(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition,
    *,
    options: SamplingOptions = _DEFAULT,
    on_progress: OnProgress | None = None,
) -> UInt8[np.ndarray, "b t h w 3"]:
    """Videos out of noise, a program per step: one serves any number of steps, shift and scales.

    Args:
      positive: conditions of the clips.
      negative: what guidance leads away from; not looked at without guidance.
      on_progress: is called as each step and the decoding begin, once what came before is computed.

    Raises:
      UserError: an option that the model has no use for.
    """
    report = on_progress or (lambda _: None)
    how, plan = _plan(model, noise, options)
    negative_used = None if how.guided == "never" else negative
    plan = jax.tree.map(lambda x: np.pad(x, (0, _MAX_STEPS + 1 - len(x))), plan)
    state, count = _begin(model, noise, positive, negative_used, plan, how=how), options.grid.num_steps
    for step in range(count):
        if on_progress is not None:
            jax.block_until_ready(state)
        report(Progress("step", step, count))
        state = _advance(model, state, positive, negative_used, plan, np.int32(step), how=how)
    if on_progress is not None:
        jax.block_until_ready(state)
    report(Progress("decoding", count, count))
    return np.asarray(_decode(vae, state.latents, positive))


def denoise_on_device(
    model: TextToVideo,
    vae: VideoVAE,
    noise: Latents,
    positive: Condition,
    negative: Condition,
    *,
    options: SamplingOptions = _DEFAULT,
) -> UInt8[Array, "b t h w 3"]:
    """`denoise` as one program on the devices, which may be a part of another."""
    how, plan = _plan(model, noise, options)
    network = _network(model, positive, None if how.guided == "never" else negative, plan, how)

    def body(state: SamplerState, step: Array) -> tuple[SamplerState, None]:
        return sampler.step(network, state, step, plan.timesteps, how.stepper), None

    start = sampler.init_state(network, noise, how.stepper)
    state, _ = jax.lax.scan(body, start, jnp.arange(options.grid.num_steps))
    return _decode(vae, state.latents, positive)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds: UInt32[Array, "b"], *, shape: tuple[int, int, int, int]) -> Latents:
    return constrain(initial_noise(seeds, shape), "batch", None, None, None, None)


class _Plan(NamedTuple):
    """What differs from step to step; arrays that may go on beyond the last step.

    Attributes:
      scales: of guidance.
      guided: whether there is guidance.
      computed: whether the transformer's blocks are computed; None without a cache.
    """

    timesteps: Timesteps
    scales: Float[np.ndarray, "s"] | Float[Array, "s"]
    guided: Bool[np.ndarray, "s"] | Bool[Array, "s"]
    computed: Bool[np.ndarray, "s"] | Bool[Array, "s"] | None


@dataclasses.dataclass(frozen=True)
class _How:
    """What is fixed in the program of a step."""

    stepper: AnyStepper
    guidance: AnyGuidance
    guided: Literal["always", "sometimes", "never"]


def _plan(model: TextToVideo, noise: Latents, options: SamplingOptions) -> tuple[_How, _Plan]:
    experts = isinstance(model.dit, NoiseLevelExperts)
    if options.cache is not None and experts:
        raise UserError("cache: a model with two transformers has none; leave it out")
    if options.guidance_scale_2 is not None and not experts:
        raise UserError("guidance_scale_2 is for models with two transformers; leave it out")
    grid = options.grid.for_tokens(math.prod(model.dit.config.token_grid(*noise.shape[1:4])))
    timesteps, model_timesteps = grid.timesteps(), grid.model_timesteps()
    scale = options.guidance_scale
    second = scale if options.guidance_scale_2 is None else options.guidance_scale_2
    # The first scale; below the boundary of two transformers the second.
    boundary = np.float32(model.dit.boundary if isinstance(model.dit, NoiseLevelExperts) else 0.0)
    scales = np.where(model_timesteps[:-1] >= boundary, scale, second).astype(np.float32)
    low, high = options.guidance_interval
    guided = (low < timesteps[:-1]) & (timesteps[:-1] <= high) & ((scale, second) != (1.0, 1.0))
    how = _How(
        options.stepper,
        options.guidance,
        "always" if guided.all() else "sometimes" if guided.any() else "never",
    )
    computed = (
        None if options.cache is None else _computed(model, options.cache, model_timesteps[:-1], guided)
    )
    return how, _Plan(Timesteps(timesteps, model_timesteps), scales, guided, computed)


def _computed(
    model: TextToVideo,
    cache: TeaCache,
    model_timesteps: Float[np.ndarray, "s"],
    guided: Bool[np.ndarray, "s"],
) -> Bool[np.ndarray, "s"] | Bool[Array, "s"]:
    """The steps in which the blocks are computed."""
    # What the negative prompt's tokens had added is not known where guidance begins.
    forced = guided & ~np.roll(guided, 1)
    forced[[0, -1]] = True
    assert isinstance(model.dit, DiT)
    computed = jax.jit(
        lambda dit: constrain(cache.computed(dit, jnp.asarray(model_timesteps), forced), None)
    )(model.dit)
    # Within another program it stays on the device.
    return computed if isinstance(computed, Tracer) else np.asarray(computed)


def _network(
    model: TextToVideo, positive: Condition, negative: Condition | None, plan: _Plan, how: _How
) -> StatefulNetwork:
    denoiser = (
        UncachedDenoiser(model.velocity)
        if plan.computed is None
        else CachedDenoiser(model=model, computed=jnp.asarray(plan.computed))
    )
    if how.guided == "never":
        return Conditional(denoiser=denoiser, condition=positive)
    return Guided(
        denoiser=denoiser,
        positive=positive,
        negative=negative,
        guidance=how.guidance,
        scale=jnp.asarray(plan.scales),
        steps=None if how.guided == "always" else jnp.asarray(plan.guided),
        where=None if positive.known_mask is None else ~positive.known_mask[..., None],
    )


@functools.partial(jax.jit, static_argnames="how")
def _begin(
    model: TextToVideo,
    noise: Latents,
    positive: Condition,
    negative: Condition | None,
    plan: _Plan,
    *,
    how: _How,
) -> SamplerState:
    return _placed(sampler.init_state(_network(model, positive, negative, plan, how), noise, how.stepper))


@functools.partial(jax.jit, static_argnames="how", donate_argnames="state")
def _advance(
    model: TextToVideo,
    state: SamplerState,
    positive: Condition,
    negative: Condition | None,
    plan: _Plan,
    step: Int[Array, ""],
    *,
    how: _How,
) -> SamplerState:
    network = _network(model, positive, negative, plan, how)
    return _placed(sampler.step(network, state, step, plan.timesteps, how.stepper))


def _placed(state: SamplerState) -> SamplerState:
    """The state as it is sharded in every step, so that one program serves them all."""

    def place(x: Array) -> Array:
        if x.ndim == 3:  # Tokens, which a cache keeps.
            return constrain(x, "batch", "tokens", None)
        return constrain(x, *("batch" if axis == 0 else None for axis in range(x.ndim)))

    return jax.tree.map(place, state)


@jax.jit
def _decode(vae: VideoVAE, latents: Latents, condition: Condition) -> UInt8[Array, "b t h w 3"]:
    video = streaming.decode(vae, with_known(latents, condition), emit=pixels.to_uint8)
    # Whole on every device, so that each process can read it.
    return constrain(video, None, None, None, None, None)
