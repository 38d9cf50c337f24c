"""Guidance rules: combine the velocities for the prompt and for the negative prompt."""

import dataclasses
from typing import Annotated, Literal, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp

from vidgen.core.limits import MOMENTUM, NON_NEGATIVE, POSITIVE, PROBABILITY, STEP, check_fields
from vidgen.core.typing import Array, Bool, Float, Int, Noisy, PyTree

__all__ = ["GUIDANCES", "AdaptiveProjected", "AnyGuidance", "ClassifierFree", "Guidance", "ZeroStar"]

_TINY = 1e-12
"""Smaller standard deviations count as 0."""

Predicted: TypeAlias = Bool[Array, "b *#rest"]
_PerClip: TypeAlias = Float[Array, "b *#rest"]


@runtime_checkable
class Guidance(Protocol):
    """Combines two velocities; its state is passed from one sampler step to the next."""

    def init(self, latents: Noisy) -> PyTree:
        """State before the first step."""
        ...

    def combine(
        self,
        positive: Noisy,
        negative: Noisy,
        *,
        latents: Noisy,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        state: PyTree,
        step: Int[Array, ""],
        where: Predicted | None = None,
    ) -> tuple[Noisy, PyTree]:
        """The guided velocity, and the state for the next step.

        Args:
          positive, negative: velocities at `latents` and `timestep`.
          scale: of guidance; 1 is `positive`.
          step: number of the step, from 0.
          where: true for predicted latents, false for known ones, with a last axis of 1; None is all
            predicted. Known latents enter no norm or projection, and their velocity is 0.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """negative + scale (positive - negative) (arXiv 2207.12598).

    Attributes:
      rescale: in [0, 1], how far the standard deviation of each clip's velocity is moved back to that of
        `positive`, against overexposure (arXiv 2305.08891, section 3.4).
    """

    kind: Literal["cfg"] = "cfg"
    rescale: Annotated[float, PROBABILITY] = 0.0

    def __post_init__(self):
        check_fields(self)

    def init(self, latents: Noisy) -> PyTree:
        return ()

    def combine(
        self,
        positive: Noisy,
        negative: Noisy,
        *,
        latents: Noisy,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        state: PyTree,
        step: Int[Array, ""],
        where: Predicted | None = None,
    ) -> tuple[Noisy, PyTree]:
        guided = negative + scale * (positive - negative)
        if self.rescale:
            before, after = _std(positive, where), _std(guided, where)
            ratio = jnp.where(after > _TINY, before / jnp.maximum(after, _TINY), 1.0)
            guided = guided * (1.0 + self.rescale * (ratio - 1.0))
        return _only(guided, where), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroStar:
    """CFG-Zero*, for flow models: scales the negative velocity to fit the positive one (arXiv 2503.18886).

    Attributes:
      zero_steps: number of first steps with zero velocity, where an undertrained model errs most.
    """

    kind: Literal["cfg_zero_star"] = "cfg_zero_star"
    zero_steps: Annotated[int, STEP] = 1

    def __post_init__(self):
        check_fields(self)

    def init(self, latents: Noisy) -> PyTree:
        return ()

    def combine(
        self,
        positive: Noisy,
        negative: Noisy,
        *,
        latents: Noisy,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        state: PyTree,
        step: Int[Array, ""],
        where: Predicted | None = None,
    ) -> tuple[Noisy, PyTree]:
        fit = _dot(positive, negative, where) / (_dot(negative, negative, where) + 1e-8)
        guided = fit * negative + scale * (positive - fit * negative)
        return jnp.where(step < self.zero_steps, 0.0, _only(guided, where)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveProjected:
    """Adaptive projected guidance: high scales without oversaturation (arXiv 2410.02416).

    The change that guidance adds to the clean prediction is averaged over the steps, clipped in norm, and
    reduced along the prompt's prediction.

    Attributes:
      eta: factor of the change's component parallel to the prediction, which saturates colours; 1 keeps it.
      norm_threshold: largest Euclidean norm of the unscaled change over all latents of a clip; the norm grows
        with the square root of their number. None is no limit; the paper uses 15 for 4 x 128 x 128.
      momentum: weight of past changes; negative values, as in the paper, push away from them.
    """

    kind: Literal["apg"] = "apg"
    eta: Annotated[float, NON_NEGATIVE] = 0.0
    norm_threshold: Annotated[float, POSITIVE] | None = None
    momentum: Annotated[float, MOMENTUM] = -0.5

    def __post_init__(self):
        check_fields(self)

    def init(self, latents: Noisy) -> PyTree:
        return jnp.zeros_like(latents)

    def combine(
        self,
        positive: Noisy,
        negative: Noisy,
        *,
        latents: Noisy,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        state: PyTree,
        step: Int[Array, ""],
        where: Predicted | None = None,
    ) -> tuple[Noisy, PyTree]:
        t = timestep.reshape(-1, *[1] * (latents.ndim - 1))
        positive, negative = _only(positive, where), _only(negative, where)
        clean = _only(latents - t * positive, where)
        # The change of the clean prediction is -t times the change of the velocity. The code computes the
        # latter, which is finite at t = 0 too (Heun's last call), where the past has no weight.
        past = jnp.where(t > 0.0, self.momentum * state / jnp.where(t > 0.0, t, 1.0), 0.0)
        change = positive - negative - past
        average = -t * change
        if self.norm_threshold is not None:
            norm = jnp.sqrt(_dot(average, average, None))
            change = change * (self.norm_threshold / jnp.maximum(norm, self.norm_threshold))
        along = _dot(change, clean, None) / jnp.maximum(_dot(clean, clean, None), 1e-24) * clean
        return positive + (scale - 1.0) * (change - (1.0 - self.eta) * along), average


def _axes(x: Noisy) -> tuple[int, ...]:
    """Axes of one clip's latents."""
    return tuple(range(1, x.ndim))


def _only(x: Noisy, where: Predicted | None) -> Noisy:
    """`x` for predicted latents, 0 for known ones."""
    return x if where is None else jnp.where(where, x, 0.0)


def _dot(a: Noisy, b: Noisy, where: Predicted | None) -> _PerClip:
    """Inner product over the predicted latents of each clip."""
    return _only(a * b, where).sum(_axes(a), keepdims=True)


def _std(x: Noisy, where: Predicted | None) -> _PerClip:
    """Standard deviation over the predicted latents of each clip; 0 for a clip without any."""
    if where is None:
        return x.std(_axes(x), keepdims=True)
    count = jnp.maximum(x.shape[-1] * where.sum(_axes(x), keepdims=True), 1)
    mean = _only(x, where).sum(_axes(x), keepdims=True) / count
    return jnp.sqrt(_only(jnp.square(x - mean), where).sum(_axes(x), keepdims=True) / count)


AnyGuidance = ClassifierFree | ZeroStar | AdaptiveProjected | Guidance

GUIDANCES: dict[str, AnyGuidance] = {
    guidance.kind: guidance for guidance in (ClassifierFree(), ZeroStar(), AdaptiveProjected())
}
"""Guidance rules by name."""
