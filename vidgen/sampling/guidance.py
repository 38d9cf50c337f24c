"""Guidance: of the velocities under a prompt and under a negative prompt, the one that is followed."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.typing import Array, Float, Int, Latents, PyTree

__all__ = ["GUIDANCES", "AdaptiveProjected", "AnyGuidance", "ClassifierFree", "Guidance", "ZeroStar"]

_AXES = (1, 2, 3, 4)
"""Of one clip's latents."""


@runtime_checkable
class Guidance(Protocol):
    """Combines two velocities; `memory` is what it keeps between steps."""

    def init(self, latents: Latents) -> PyTree:
        """Memory before the first step."""
        ...

    def combine(
        self,
        positive: Latents,
        negative: Latents,
        *,
        latents: Latents,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        """The velocity to follow, and the memory for the next step.

        Args:
          positive, negative: velocities at `latents` and `timestep`.
          scale: of guidance; 1 is `positive`.
          step: number of the step, from 0.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """negative + scale (positive - negative) (arXiv 2207.12598).

    Attributes:
      rescale: from 0 to 1, how far the standard deviation of each clip's velocity is brought back to that of
        `positive`, against overexposure (arXiv 2305.08891, section 3.4).
    """

    kind: Literal["cfg"] = "cfg"
    rescale: float = 0.0

    def init(self, latents: Latents) -> PyTree:
        return ()

    def combine(
        self,
        positive: Latents,
        negative: Latents,
        *,
        latents: Latents,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        guided = negative + scale * (positive - negative)
        if self.rescale:
            ratio = positive.std(_AXES, keepdims=True) / guided.std(_AXES, keepdims=True)
            guided = guided * (1.0 + self.rescale * (ratio - 1.0))
        return guided, memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroStar:
    """CFG-Zero*: for flows, with the negative velocity scaled to fit the positive one (arXiv 2503.18886).

    Attributes:
      zero_steps: first steps in which nothing moves, where a model that is not fully trained errs most.
    """

    kind: Literal["cfg_zero_star"] = "cfg_zero_star"
    zero_steps: int = 1

    def init(self, latents: Latents) -> PyTree:
        return ()

    def combine(
        self,
        positive: Latents,
        negative: Latents,
        *,
        latents: Latents,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        fit = _dot(positive, negative) / (_dot(negative, negative) + 1e-8)
        guided = fit * negative + scale * (positive - fit * negative)
        return jnp.where(step < self.zero_steps, 0.0, guided), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveProjected:
    """Adaptive projected guidance: high scales without oversaturation (arXiv 2410.02416).

    What guidance adds to the clean prediction is averaged over the steps, shortened, and weakened along the
    prediction under the prompt.

    Attributes:
      eta: share that is kept of the part along the prediction, which saturates colours; 1 is all of it.
      norm_threshold: largest Euclidean norm of the unscaled change, over all latents of a clip: it grows with
        the square root of their number. None is no limit; the paper has 15 for 4 x 128 x 128.
      momentum: weight of the past changes; negative values, as in the paper, push away from them.
    """

    kind: Literal["apg"] = "apg"
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5

    def init(self, latents: Latents) -> PyTree:
        return jnp.zeros_like(latents)

    def combine(
        self,
        positive: Latents,
        negative: Latents,
        *,
        latents: Latents,
        timestep: Float[Array, "b"],
        scale: float | Float[Array, ""],
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        t = timestep.reshape(-1, 1, 1, 1, 1)
        clean = latents - t * positive
        # The change of the clean prediction is -t times that of the velocity. It is computed as the latter,
        # which is finite at t = 0 too (Heun's last call), where the past counts for nothing.
        past = jnp.where(t > 0.0, self.momentum * memory / jnp.where(t > 0.0, t, 1.0), 0.0)
        change = positive - negative - past
        average = -t * change
        if self.norm_threshold is not None:
            norm = jnp.sqrt(_dot(average, average))
            change = change * (self.norm_threshold / jnp.maximum(norm, self.norm_threshold))
        along = _dot(change, clean) / jnp.maximum(_dot(clean, clean), 1e-24) * clean
        return positive + (scale - 1.0) * (change - (1.0 - self.eta) * along), average


def _dot(a: Latents, b: Latents) -> Float[Array, "b 1 1 1 1"]:
    """Of the latents of each clip."""
    return (a * b).sum(_AXES, keepdims=True)


AnyGuidance = ClassifierFree | ZeroStar | AdaptiveProjected

GUIDANCES: dict[str, AnyGuidance] = {
    guidance.kind: guidance for guidance in (ClassifierFree(), ZeroStar(), AdaptiveProjected())
}
"""By name."""
