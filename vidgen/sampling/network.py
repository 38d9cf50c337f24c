"""The velocity field that a sampler integrates: a denoiser with its conditions, and state between steps."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.streams import Streams
from vidgen.core.tokens import Tokens
from vidgen.core.typing import Array, Bool, Float, Int, Noisy, PyTree
from vidgen.models.dit.model import ResidualCache, Transformer
from vidgen.parallel.rules import constrain
from vidgen.sampling.guidance import Guidance

__all__ = ["Conditional", "Denoiser", "Guided", "StatefulNetwork", "StatelessNetwork", "TransformerDenoiser"]


@runtime_checkable
class StatefulNetwork(Protocol):
    """A velocity field whose state is passed from one sampler step to the next."""

    def init(self, latents: Noisy) -> PyTree:
        """State before the first step."""
        ...

    def apply(
        self, latents: Noisy, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Noisy, PyTree]:
        """Velocity, and the state for the next step.

        Args:
          timestep: in [0, 1].
          step: number of the step, from 0.
        """
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A model's velocity for a condition; the first axis of each leaf of its state is the batch."""

    def init(self, latents: Noisy) -> PyTree:
        """State before the first step."""
        ...

    def apply(
        self,
        latents: Noisy,
        timestep: Float[Array, "b"],
        condition: PyTree,
        state: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Noisy, PyTree]:
        """Velocity for `condition`, and the state for the next step."""
        ...


@dataclasses.dataclass(frozen=True)
class StatelessNetwork:
    """Wraps a velocity network as a field without state."""

    network: VelocityNetwork

    def init(self, latents: Noisy) -> PyTree:
        return ()

    def apply(
        self, latents: Noisy, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Noisy, PyTree]:
        return self.network(latents, timestep), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerDenoiser:
    """A transformer's velocity; latents are patches, one sequence per video, and conditions are streams.

    Attributes:
      positions: of the tokens, equal in all sequences.
      known_patches, known_mask: known tokens of each video, for one or several conditions per video.
      computed: mask of the steps that compute the blocks; the others reuse their residual, the output minus
        the input, from an earlier step. True for the first step; None computes them in every step.
    """

    transformer: Transformer
    positions: Int[np.ndarray, "1 s 3"]
    known_patches: Float[Array, "b s p"] | None = None
    known_mask: Bool[Array, "b s"] | None = None
    computed: Bool[Array, "steps"] | None = None

    def init(self, latents: Float[Array, "b s p"]) -> PyTree:
        if self.computed is None:
            return ()
        config = self.transformer.config
        residual = jnp.zeros((*latents.shape[:2], config.model_dim), config.dtype)
        return constrain(residual, "batch", "tokens", None)

    def apply(
        self,
        latents: Float[Array, "b s p"],
        timestep: Float[Array, "b"],
        condition: Streams,
        state: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "b s p"], PyTree]:
        tokens = Tokens(latents, self.positions)
        if self.known_mask is not None and self.known_patches is not None:
            copies = len(latents) // len(self.known_mask)
            known_mask = jnp.concatenate([self.known_mask] * copies)
            known_patches = jnp.concatenate([self.known_patches] * copies)
            patches = jnp.where(known_mask[..., None], known_patches, latents)
            tokens = tokens._replace(patches=patches, known_mask=known_mask)
        cache = None if self.computed is None else ResidualCache(state, self.computed[step])
        velocity, cache = self.transformer(tokens, timestep[:, None], condition, cache)
        return velocity, state if cache is None else cache.residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional:
    """The denoiser with one condition, without guidance."""

    denoiser: Denoiser
    condition: PyTree

    def init(self, latents: Noisy) -> PyTree:
        return self.denoiser.init(latents)

    def apply(
        self, latents: Noisy, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Noisy, PyTree]:
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
    where: Bool[Array, "b *rest"] | None = None

    def init(self, latents: Noisy) -> PyTree:
        return self.denoiser.init(_joined(latents, latents)), self.guidance.init(latents)

    def apply(
        self, latents: Noisy, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Noisy, PyTree]:
        if self.steps is not None and not (isinstance(self.steps, np.ndarray) and self.steps.all()):
            guided = dataclasses.replace(self, steps=None).apply
            is_guided = jnp.asarray(self.steps)[step]
            return jax.lax.cond(is_guided, guided, self._unguided, latents, timestep, state, step)
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
        self, latents: Noisy, timestep: Float[Array, "b"], state: PyTree, step: Int[Array, ""]
    ) -> tuple[Noisy, PyTree]:
        denoiser_state, guidance_state = state
        count = len(latents)
        halves = slice(count), slice(count, None)
        first, rest = (jax.tree.map(lambda x, s=s: x[s], denoiser_state) for s in halves)
        velocity, first = self.denoiser.apply(latents, timestep, self.positive, first, step)
        return velocity, (_joined(first, rest), guidance_state)


def _joined(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
