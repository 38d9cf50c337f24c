"""The network that a sampler integrates: a model under its conditions, with what is kept between steps."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Bool, Float, Int, Latents, PyTree
from vidgen.sampling.guidance import Guidance

__all__ = ["Conditional", "Direct", "Guided", "Memoryless", "Passes", "SteppedNetwork"]


@runtime_checkable
class SteppedNetwork(Protocol):
    """A velocity network that keeps something from one step of the sampler to the next."""

    def init(self, latents: Latents) -> PyTree:
        """Memory before the first step."""
        ...

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        """Velocity, and the memory for the next step.

        Args:
          timestep: in [0, 1], what the model is told.
          step: number of the step, from 0.
        """
        ...


@runtime_checkable
class Passes(Protocol):
    """A model's forward passes; `memory` is of arrays with the batch first."""

    def init(self, latents: Latents) -> PyTree:
        """Memory before the first step."""
        ...

    def apply(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: PyTree,
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        """Velocity under a condition, and the memory for the next step."""
        ...


@dataclasses.dataclass(frozen=True)
class Memoryless:
    """A network that keeps nothing."""

    network: VelocityNetwork

    def init(self, latents: Latents) -> PyTree:
        return ()

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        return self.network(latents, timestep), memory


@dataclasses.dataclass(frozen=True)
class Direct:
    """Passes of a model that is computed in full at each step."""

    velocity: Callable[[Latents, Float[Array, "b"], PyTree], Latents]

    def init(self, latents: Latents) -> PyTree:
        return ()

    def apply(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: PyTree,
        memory: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        return self.velocity(latents, timestep, condition), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional:
    """The model under one condition."""

    passes: Passes
    condition: PyTree

    def init(self, latents: Latents) -> PyTree:
        return self.passes.init(latents)

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        return self.passes.apply(latents, timestep, self.condition, memory, step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
    """The model under two conditions, both computed in one pass of twice the batch.

    Attributes:
      positive, negative: conditions of equal structure, batch first.
      guidance: makes one velocity of the two.
      scale: of guidance, of each step or of all; 1 is the model under `positive` alone.
      steps: which of the sampler's steps are guided; in the others the model is not computed under
        `negative`, at half the cost. None is all.
      where: latents whose velocity is predicted, for models that are given others; None is all.
    """

    passes: Passes
    positive: PyTree
    negative: PyTree
    guidance: Guidance
    scale: float | Float[Array, ""] | Float[Array, "s"]
    steps: Bool[np.ndarray, "s"] | Bool[Array, "s"] | None = None
    where: Bool[Array, "b t h w 1"] | None = None

    def init(self, latents: Latents) -> PyTree:
        return self.passes.init(_joined(latents, latents)), self.guidance.init(latents)

    def apply(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        if self.steps is None or (isinstance(self.steps, np.ndarray) and self.steps.all()):
            return self._guided(latents, timestep, memory, step)
        return jax.lax.cond(
            jnp.asarray(self.steps)[step], self._guided, self._alone, latents, timestep, memory, step
        )

    def _guided(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        kept, own = memory
        doubled, kept = self.passes.apply(
            _joined(latents, latents),
            _joined(timestep, timestep),
            _joined(self.positive, self.negative),
            kept,
            step,
        )
        positive, negative = jnp.split(doubled, 2)
        velocity, own = self.guidance.combine(
            positive,
            negative,
            latents=latents,
            timestep=timestep,
            scale=self.scale if jnp.ndim(self.scale) == 0 else jnp.asarray(self.scale)[step],
            memory=own,
            step=step,
            where=self.where,
        )
        return velocity, (kept, own)

    def _alone(
        self, latents: Latents, timestep: Float[Array, "b"], memory: PyTree, step: Int[Array, ""]
    ) -> tuple[Latents, PyTree]:
        kept, own = memory
        count = len(latents)
        first, second = (jax.tree.map(lambda x, s=s: x[s], kept) for s in (slice(count), slice(count, None)))
        velocity, first = self.passes.apply(latents, timestep, self.positive, first, step)
        return velocity, (_joined(first, second), own)


def _joined(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
