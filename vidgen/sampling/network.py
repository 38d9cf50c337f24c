"""The velocity field that a sampler integrates: a denoiser with its conditions, and state between steps."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Bool, Float, Int, Latents, PyTree
from vidgen.sampling.guidance import Guidance

__all__ = ["Conditional", "Denoiser", "Guided", "StatefulNetwork", "StatelessNetwork", "UncachedDenoiser"]


@runtime_checkable
class StatefulNetwork(Protocol):
    """A velocity field whose state is passed from one sampler step to the next."""

    def init(self, latents: Latents) -> PyTree:
        """State before the first step."""
        ...

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        """Velocity, and the state for the next step.

        Args:
          timestep: in [0, 1].
          step: number of the step, from 0.
        """
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A model's velocity for a condition; the first axis of each leaf of its state is the batch."""

    def init(self, latents: Latents) -> PyTree:
        """State before the first step."""
        ...

    def apply(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: PyTree,
        state: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        """Velocity for `condition`, and the state for the next step."""
        ...


@dataclasses.dataclass(frozen=True)
class StatelessNetwork:
    """Wraps a velocity network as a field without state."""

    network: VelocityNetwork

    def init(self, latents: Latents) -> PyTree:
        return ()

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        return self.network(latents, timestep), state


@dataclasses.dataclass(frozen=True)
class UncachedDenoiser:
    """A model that computes all its blocks in every step."""

    velocity: Callable[[Latents, Float[Array, "b"], PyTree], Latents]

    def init(self, latents: Latents) -> PyTree:
        return ()

    def apply(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: PyTree,
        state: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        return self.velocity(latents, timestep, condition), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional:
    """The denoiser with one condition, without guidance."""

    denoiser: Denoiser
    condition: PyTree

    def init(self, latents: Latents) -> PyTree:
        return self.denoiser.init(latents)

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        return self.denoiser.apply(latents, timestep, self.condition, state, step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
    """The denoiser with two conditions, evaluated as one batch of twice the size.

    Attributes:
      positive, negative: conditions of equal structure, batch axis first.
      guidance: rule that combines the two velocities.
      scale: guidance scale, one for all steps or one per step; 1 is the velocity for `positive`.
      steps: mask of the steps with guidance; the others evaluate only `positive`, at half the cost. None is
        all steps.
      where: true for predicted latents, false for known ones; None is all predicted.
    """

    denoiser: Denoiser
    positive: PyTree
    negative: PyTree
    guidance: Guidance
    scale: float | Float[Array, ""] | Float[Array, "s"]
    steps: Bool[np.ndarray, "s"] | Bool[Array, "s"] | None = None
    where: Bool[Array, "b t h w 1"] | None = None

    def init(self, latents: Latents) -> PyTree:
        return self.denoiser.init(_joined(latents, latents)), self.guidance.init(latents)

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        if self.steps is None or (isinstance(self.steps, np.ndarray) and self.steps.all()):
            return self._guided(latents, timestep, state, step)
        return jax.lax.cond(
            jnp.asarray(self.steps)[step], self._guided, self._unguided, latents, timestep, state, step
        )

    def _guided(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        denoiser_state, guidance_state = state
        doubled, denoiser_state = self.denoiser.apply(
            _joined(latents, latents),
            _joined(timestep, timestep),
            _joined(self.positive, self.negative),
            denoiser_state,
            step,
        )
        positive, negative = jnp.split(doubled, 2)
        velocity, guidance_state = self.guidance.combine(
            positive,
            negative,
            latents=latents,
            timestep=timestep,
            scale=self.scale if jnp.ndim(self.scale) == 0 else jnp.asarray(self.scale)[step],
            state=guidance_state,
            step=step,
            where=self.where,
        )
        return velocity, (denoiser_state, guidance_state)

    def _unguided(
        self, latents: Latents, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        denoiser_state, guidance_state = state
        count = len(latents)
        halves = slice(count), slice(count, None)
        first, rest = (jax.tree.map(lambda x, s=s: x[s], denoiser_state) for s in halves)
        velocity, first = self.denoiser.apply(latents, timestep, self.positive, first, step)
        return velocity, (_joined(first, rest), guidance_state)


def _joined(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
