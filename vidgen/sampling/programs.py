"""The compiled programs of sampling: the first state, a step, and decoding."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.limits import SAMPLER_STEPS, SEED
from vidgen.core.streams import Streams
from vidgen.core.tokens import patchify, unpatchify
from vidgen.core.typing import Array, Bool, Float, Int, Latents, UInt8, UInt32
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.model import DiT, Transformer
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.embeddings import grid_positions
from vidgen.parallel.rules import constrain
from vidgen.sampling import sampler
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.conditioning import Condition
from vidgen.sampling.guidance import AnyGuidance
from vidgen.sampling.network import Conditional, Guided, StatefulNetwork, TransformerDenoiser
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.sampler import SamplerState, Timesteps, initial_noise
from vidgen.sampling.steppers import AnyStepper

__all__ = ["Programs", "denoise_on_device", "make_programs", "seeded_noise"]

_MAX_STEPS = int(SAMPLER_STEPS.high)
"""Per-step values are padded to this length, so that one program serves any number of steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The programs of one request; the one of a step serves any steps, shift and scales.

    Attributes:
      num_steps: of the sampler.
      init: state before the first step.
      step: state after the step of this number, from 0. The state passed in is donated.
      decode: uint8 frames `b t h w 3` of patches.
    """

    num_steps: int
    init: Callable[[], SamplerState]
    step: Callable[[SamplerState, np.int32], SamplerState]
    decode: Callable[[Float[Array, "b s p"]], UInt8[Array, "b t h w 3"]]


def make_programs(
    transformer: Transformer,
    vae: VideoVAE,
    noise: Latents,
    condition: Condition,
    *,
    options: SamplingOptions,
    keep_clean: bool = False,
) -> Programs:
    """Programs that denoise and decode; nothing is compiled or run yet.

    Args:
      keep_clean: whether states have the prediction of the clean latents, for previews.

    Raises:
      UserError: an option does not apply to the model.
    """
    static, plan = _plan(transformer, noise, options, keep_clean)
    plan = jax.tree.map(lambda x: np.pad(x, (0, _MAX_STEPS + 1 - len(x))), plan)
    arrays = (transformer, _Condition.of(condition, static), plan)
    return Programs(
        num_steps=options.grid.num_steps,
        init=functools.partial(_init, *arrays, noise, static=static),
        step=functools.partial(_step, *arrays, static=static),
        decode=functools.partial(_decode, vae, known=arrays[1].known, static=static),
    )


def denoise_on_device(
    transformer: Transformer,
    vae: VideoVAE,
    noise: Latents,
    condition: Condition,
    *,
    options: SamplingOptions,
) -> UInt8[Array, "b t h w 3"]:
    """The scan of all steps and the decoding as one traceable program, which may be part of another one."""
    static, plan = _plan(transformer, noise, options, keep_clean=False)
    given = _Condition.of(condition, static)
    network = _network(transformer, given, plan, static)

    def body(state: SamplerState, step: Array) -> tuple[SamplerState, None]:
        return sampler.step(network, state, step, plan.timesteps, static.stepper), None

    initial = sampler.init_state(network, patchify(noise, static.dit.patch_size), static.stepper)
    state, _ = jax.lax.scan(body, initial, jnp.arange(options.grid.num_steps))
    return _decode(vae, state.latents, known=given.known, static=static)


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


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds: UInt32[Array, "b"], *, shape: tuple[int, int, int, int]) -> Latents:
    return constrain(initial_noise(seeds, shape), "batch", None, None, None, None)


class _Condition(NamedTuple):
    """A `Condition` as arrays of the programs; `negative` is None without guidance."""

    positive: Streams
    negative: Streams | None
    known: tuple[Float[Array, "b s p"], Bool[Array, "b s"]] | None

    @classmethod
    def of(cls, condition: Condition, static: "_Static") -> "_Condition":
        streams = dict(condition.streams)
        return cls(
            streams,
            None if static.guided == "never" else streams | dict(condition.negative),
            None
            if condition.known_mask is None or condition.known_patches is None
            else (condition.known_patches, condition.known_mask),
        )


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
    """What is static in the programs."""

    dit: DiTConfig
    grid: tuple[int, int, int]
    stepper: AnyStepper
    guidance: AnyGuidance
    guided: Literal["always", "sometimes", "never"]
    keep_clean: bool


def _plan(
    transformer: Transformer, noise: Latents, options: SamplingOptions, keep_clean: bool
) -> tuple[_Static, _Plan]:
    experts = isinstance(transformer, NoiseLevelExperts)
    if options.cache is not None and experts:
        raise UserError("cache: a model with two transformers does not support one; leave it out")
    if options.guidance_scale_2 is not None and not experts:
        raise UserError("guidance_scale_2 is for models with two transformers; leave it out")
    token_grid = transformer.config.token_grid(*noise.shape[1:4])
    grid = options.grid.for_tokens(math.prod(token_grid))
    timesteps, model_timesteps = grid.timesteps(), grid.model_timesteps()
    scale = options.guidance_scale
    second = scale if options.guidance_scale_2 is None else options.guidance_scale_2
    # The second scale applies below the boundary of two transformers.
    boundary = np.float32(transformer.boundary if isinstance(transformer, NoiseLevelExperts) else 0.0)
    scales = np.where(model_timesteps[:-1] >= boundary, scale, second).astype(np.float32)
    low, high = options.guidance_interval
    guided = (low < timesteps[:-1]) & (timesteps[:-1] <= high) & ((scale, second) != (1.0, 1.0))
    static = _Static(
        transformer.config,
        token_grid,
        options.stepper,
        options.guidance,
        "always" if guided.all() else "sometimes" if guided.any() else "never",
        keep_clean,
    )
    computed = None
    if options.cache is not None:
        computed = _computed(transformer, options.cache, model_timesteps[:-1], guided)
    return static, _Plan(Timesteps(timesteps, model_timesteps), scales, guided, computed)


def _computed(
    transformer: Transformer,
    cache: TeaCache,
    model_timesteps: Float[np.ndarray, "s"],
    guided: Bool[np.ndarray, "s"],
) -> Bool[np.ndarray, "s"] | Bool[Array, "s"]:
    """Mask of the steps that compute the blocks."""
    # Where guidance begins, the negative prompt has no residual to reuse.
    forced = guided & ~np.roll(guided, 1)
    forced[[0, -1]] = True
    assert isinstance(transformer, DiT)
    computed = jax.jit(
        lambda dit: constrain(cache.computed(dit, jnp.asarray(model_timesteps), forced), None)
    )(transformer)
    # Inside another program the mask is traced.
    return computed if isinstance(computed, Tracer) else np.asarray(computed)


def _network(
    transformer: Transformer, condition: _Condition, plan: _Plan, static: _Static
) -> StatefulNetwork:
    known_patches, known_mask = condition.known or (None, None)
    denoiser = TransformerDenoiser(
        transformer=transformer,
        positions=grid_positions(*static.grid)[None],
        known_patches=known_patches,
        known_mask=known_mask,
        computed=None if plan.computed is None else jnp.asarray(plan.computed),
    )
    if condition.negative is None:
        return Conditional(denoiser=denoiser, condition=condition.positive)
    return Guided(
        denoiser=denoiser,
        positive=condition.positive,
        negative=condition.negative,
        guidance=static.guidance,
        scale=jnp.asarray(plan.scales),
        steps=None if static.guided == "always" else jnp.asarray(plan.guided),
        where=None if known_mask is None else ~known_mask[..., None],
    )


@functools.partial(jax.jit, static_argnames="static")
def _init(
    transformer: Transformer, condition: _Condition, plan: _Plan, noise: Latents, *, static: _Static
) -> SamplerState:
    network = _network(transformer, condition, plan, static)
    patches = patchify(noise, static.dit.patch_size)
    return _placed(sampler.init_state(network, patches, static.stepper, keep_clean=static.keep_clean))


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _step(
    transformer: Transformer,
    condition: _Condition,
    plan: _Plan,
    state: SamplerState,
    number: Int[Array, ""],
    *,
    static: _Static,
) -> SamplerState:
    network = _network(transformer, condition, plan, static)
    return _placed(sampler.step(network, state, number, plan.timesteps, static.stepper))


def _placed(state: SamplerState) -> SamplerState:
    """The state with the same sharding after every step, so that one program serves all steps."""

    def place(x: Array) -> Array:
        if x.ndim == 3:  # One vector per token.
            return constrain(x, "batch", "tokens", None)
        return constrain(x, *("batch" if axis == 0 else None for axis in range(x.ndim)))

    return jax.tree.map(place, state)


@functools.partial(jax.jit, static_argnames="static")
def _decode(
    vae: VideoVAE,
    patches: Float[Array, "b s p"],
    *,
    known: tuple[Float[Array, "b s p"], Bool[Array, "b s"]] | None,
    static: _Static,
) -> UInt8[Array, "b t h w 3"]:
    if known is not None:
        patches = jnp.where(known[1][..., None], known[0], patches)
    latents = unpatchify(patches, static.grid, static.dit.patch_size)
    video = streaming.decode(vae, latents, emit=pixels.to_uint8)
    # Replicated, so that each process can read it.
    return constrain(video, None, None, None, None, None)
