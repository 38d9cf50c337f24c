"""Generates videos from prompts with a trained model and its VAE."""

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
    """Progress of sampling.

    Attributes:
      stage: the stage that begins. The first step and the decoding compile their programs before they run.
      done: number of finished steps.
      count: number of all steps.
    """

    stage: Literal["step", "decoding"]
    done: int
    count: int


OnProgress: TypeAlias = Callable[[Progress], None]


_DEFAULT = SamplingOptions()
_MAX_STEPS = int(SAMPLER_STEPS.high)
"""Per-step values are padded to this length, so that one program serves any number of steps."""


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
    """Generates one video per prompt, which depends only on the prompt and its seed, not on the devices.

    Args:
      model: includes a byte encoder.
      size: frames, height and width, in pixels.
      seeds: one per prompt.
      negative_prompt: text that guidance steers away from.

    Raises:
      UserError: the models do not support the size, a seed is no uint32, or the numbers of prompts and seeds
        differ.
      PromptTooLong: a prompt is longer than the text encoder's limit.
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
    """Noise for one clip per seed, sharded over the mesh in context.

    Args:
      shape: of a clip's latents.

    Raises:
      UserError: a seed is no uint32.
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
    """Denoises and decodes, one program call per step; the program serves any steps, shift and scales.

    Args:
      positive: conditions of the clips.
      negative: conditions that guidance steers away from; unused without guidance.
      on_progress: called at the start of each step and of the decoding, after the previous step has finished.

    Raises:
      UserError: an option does not apply to the model.
    """
    report = on_progress or (lambda _: None)
    static, plan = _plan(model, noise, options)
    negative_used = None if static.guided == "never" else negative
    plan = jax.tree.map(lambda x: np.pad(x, (0, _MAX_STEPS + 1 - len(x))), plan)
    state, count = _begin(model, noise, positive, negative_used, plan, static=static), options.grid.num_steps
    for step in range(count):
        if on_progress is not None:
            jax.block_until_ready(state)
        report(Progress("step", step, count))
        state = _advance(model, state, positive, negative_used, plan, np.int32(step), static=static)
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
    """`denoise` as one traceable program, which may be part of another program."""
    static, plan = _plan(model, noise, options)
    network = _network(model, positive, None if static.guided == "never" else negative, plan, static)

    def body(state: SamplerState, step: Array) -> tuple[SamplerState, None]:
        return sampler.step(network, state, step, plan.timesteps, static.stepper), None

    initial = sampler.init_state(network, noise, static.stepper)
    state, _ = jax.lax.scan(body, initial, jnp.arange(options.grid.num_steps))
    return _decode(vae, state.latents, positive)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds: UInt32[Array, "b"], *, shape: tuple[int, int, int, int]) -> Latents:
    return constrain(initial_noise(seeds, shape), "batch", None, None, None, None)


class _Plan(NamedTuple):
    """Per-step values, which may be padded after the last step.

    Attributes:
      scales: guidance scale.
      guided: whether the step uses guidance.
      computed: whether the step computes the transformer's blocks; None without a cache.
    """

    timesteps: Timesteps
    scales: Float[np.ndarray, "s"] | Float[Array, "s"]
    guided: Bool[np.ndarray, "s"] | Bool[Array, "s"]
    computed: Bool[np.ndarray, "s"] | Bool[Array, "s"] | None


@dataclasses.dataclass(frozen=True)
class _Static:
    """Options that are static in the program of a step."""

    stepper: AnyStepper
    guidance: AnyGuidance
    guided: Literal["always", "sometimes", "never"]


def _plan(model: TextToVideo, noise: Latents, options: SamplingOptions) -> tuple[_Static, _Plan]:
    experts = isinstance(model.dit, NoiseLevelExperts)
    if options.cache is not None and experts:
        raise UserError("cache: a model with two transformers does not support one; leave it out")
    if options.guidance_scale_2 is not None and not experts:
        raise UserError("guidance_scale_2 is for models with two transformers; leave it out")
    grid = options.grid.for_tokens(math.prod(model.dit.config.token_grid(*noise.shape[1:4])))
    timesteps, model_timesteps = grid.timesteps(), grid.model_timesteps()
    scale = options.guidance_scale
    second = scale if options.guidance_scale_2 is None else options.guidance_scale_2
    # The second scale applies below the boundary of two transformers.
    boundary = np.float32(model.dit.boundary if isinstance(model.dit, NoiseLevelExperts) else 0.0)
    scales = np.where(model_timesteps[:-1] >= boundary, scale, second).astype(np.float32)
    low, high = options.guidance_interval
    guided = (low < timesteps[:-1]) & (timesteps[:-1] <= high) & ((scale, second) != (1.0, 1.0))
    static = _Static(
        options.stepper,
        options.guidance,
        "always" if guided.all() else "sometimes" if guided.any() else "never",
    )
    computed = (
        None if options.cache is None else _computed(model, options.cache, model_timesteps[:-1], guided)
    )
    return static, _Plan(Timesteps(timesteps, model_timesteps), scales, guided, computed)


def _computed(
    model: TextToVideo,
    cache: TeaCache,
    model_timesteps: Float[np.ndarray, "s"],
    guided: Bool[np.ndarray, "s"],
) -> Bool[np.ndarray, "s"] | Bool[Array, "s"]:
    """Mask of the steps that compute the blocks."""
    # Where guidance begins, the negative prompt has no residual to reuse.
    forced = guided & ~np.roll(guided, 1)
    forced[[0, -1]] = True
    assert isinstance(model.dit, DiT)
    computed = jax.jit(
        lambda dit: constrain(cache.computed(dit, jnp.asarray(model_timesteps), forced), None)
    )(model.dit)
    # Inside another program the mask is traced.
    return computed if isinstance(computed, Tracer) else np.asarray(computed)


def _network(
    model: TextToVideo, positive: Condition, negative: Condition | None, plan: _Plan, static: _Static
) -> StatefulNetwork:
    denoiser = (
        UncachedDenoiser(model.velocity)
        if plan.computed is None
        else CachedDenoiser(model=model, computed=jnp.asarray(plan.computed))
    )
    if static.guided == "never":
        return Conditional(denoiser=denoiser, condition=positive)
    return Guided(
        denoiser=denoiser,
        positive=positive,
        negative=negative,
        guidance=static.guidance,
        scale=jnp.asarray(plan.scales),
        steps=None if static.guided == "always" else jnp.asarray(plan.guided),
        where=None if positive.known_mask is None else ~positive.known_mask[..., None],
    )


@functools.partial(jax.jit, static_argnames="static")
def _begin(
    model: TextToVideo,
    noise: Latents,
    positive: Condition,
    negative: Condition | None,
    plan: _Plan,
    *,
    static: _Static,
) -> SamplerState:
    network = _network(model, positive, negative, plan, static)
    return _placed(sampler.init_state(network, noise, static.stepper))


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _advance(
    model: TextToVideo,
    state: SamplerState,
    positive: Condition,
    negative: Condition | None,
    plan: _Plan,
    step: Int[Array, ""],
    *,
    static: _Static,
) -> SamplerState:
    network = _network(model, positive, negative, plan, static)
    return _placed(sampler.step(network, state, step, plan.timesteps, static.stepper))


def _placed(state: SamplerState) -> SamplerState:
    """The state with the same sharding after every step, so that one program serves all steps."""

    def place(x: Array) -> Array:
        if x.ndim == 3:  # A cached residual of the tokens.
            return constrain(x, "batch", "tokens", None)
        return constrain(x, *("batch" if axis == 0 else None for axis in range(x.ndim)))

    return jax.tree.map(place, state)


@jax.jit
def _decode(vae: VideoVAE, latents: Latents, condition: Condition) -> UInt8[Array, "b t h w 3"]:
    video = streaming.decode(vae, with_known(latents, condition), emit=pixels.to_uint8)
    # Replicated, so that each process can read it.
    return constrain(video, None, None, None, None, None)
