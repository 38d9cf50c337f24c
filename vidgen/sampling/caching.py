"""Feature caching: some steps skip the transformer's blocks and reuse their last residual."""

import dataclasses
from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.limits import FINITE, NON_NEGATIVE, check_fields
from vidgen.core.typing import Array, Bool, Float
from vidgen.models.dit.model import DiT

__all__ = ["CachePolicy", "TeaCache"]


@runtime_checkable
class CachePolicy(Protocol):
    """Selects the steps that compute the transformer's blocks."""

    def computed(
        self, dit: DiT, timesteps: Float[Array, "s"], forced: Bool[np.ndarray, "s"]
    ) -> Bool[Array, "s"]:
        """Mask of the steps that compute the blocks, from the model's timesteps; includes `forced` steps."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeaCache:
    """Recomputes the blocks when the timestep's modulation has changed enough (arXiv 2411.19108).

    The change from step to step is the relative L1 distance of the modulation vectors that all blocks share,
    as in the paper's implementation for Wan; changes are summed until they reach the threshold. The decision
    depends only on the timesteps and the weights: all clips of a batch, with and without a prompt, skip the
    same steps, so no video depends on the rest of its batch.

    Attributes:
      threshold: a larger value is faster and less faithful; 0 computes every step.
      coefficients: of a polynomial from this distance to the change of the blocks' output, highest power
        first; empty uses the distance itself.
    """

    kind: Literal["teacache"] = "teacache"
    threshold: Annotated[float, NON_NEGATIVE] = 0.1
    coefficients: tuple[Annotated[float, FINITE], ...] = ()

    def __post_init__(self):
        check_fields(self)

    def computed(
        self, dit: DiT, timesteps: Float[Array, "s"], forced: Bool[np.ndarray, "s"]
    ) -> Bool[Array, "s"]:
        _, modulation = dit.condition_embedder.time(timesteps[:, None])
        modulation = modulation.reshape(len(timesteps), -1)
        size = jnp.abs(modulation).mean(1)
        distance = jnp.abs(jnp.diff(modulation, axis=0)).mean(1) / jnp.maximum(size[:-1], 1e-12)
        if self.coefficients:
            distance = jnp.polyval(jnp.asarray(self.coefficients), distance)

        def body(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            distance, is_forced = inputs
            compute = is_forced | (total + distance >= self.threshold) | (self.threshold == 0.0)
            return jnp.where(compute, 0.0, total + distance), compute

        inputs = (jnp.concatenate([jnp.zeros(1), distance]), jnp.asarray(forced))
        return jax.lax.scan(body, jnp.zeros(()), inputs)[1]
