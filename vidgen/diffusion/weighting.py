"""Weights of the velocity loss by timestep. A clip's weight does not depend on the rest of its batch."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int
from vidgen.diffusion.timesteps import TimestepDensity

__all__ = ["AnyWeighting", "CosMap", "LossWeighting", "MinSNR", "mean_weight"]


@runtime_checkable
class LossWeighting(Protocol):
    """Maps a timestep to the weight of its velocity error."""

    def weight(self, timestep: Float[Array, "..."]) -> Float[Array, "..."]:
        """Weight up to a common factor, positive and finite for timesteps in (0, 1)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosMap:
    """Weight 2 / (pi (1 - 2 t + 2 t^2)): the middle weighs twice as much as the ends.

    With uniform timesteps, equivalent to sampling from the CosMap density (arXiv 2403.03206, section 3.1).
    """

    kind: Literal["cosmap"] = "cosmap"

    def weight(self, timestep: Float[Array, "..."]) -> Float[Array, "..."]:
        return (2.0 / jnp.pi) / (1.0 - 2.0 * timestep * (1.0 - timestep))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNR:
    """Weight min(SNR, gamma) on the squared error of predicted clean latents (arXiv 2303.09556, section 3.4).

    SNR is (1 - t)^2 / t^2, and the error of the clean latents is t times the velocity's, so the weight of the
    velocity loss is min((1 - t)^2, gamma t^2): zero at both ends.
    """

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = 5.0

    def __post_init__(self):
        if self.gamma <= 0:
            raise UserError(f"gamma={self.gamma} must be positive")

    def weight(self, timestep: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.minimum(jnp.square(1.0 - timestep), self.gamma * jnp.square(timestep))


AnyWeighting = CosMap | MinSNR

_LEVELS = 4096


def mean_weight(
    weighting: LossWeighting, density: TimestepDensity, num_tokens: int | Int[Array, "b"]
) -> Float[Array, "#b"]:
    """Expected weight of timesteps drawn from `density`; dividing by it makes weights 1 on average.

    Integrates over the density instead of averaging over a batch, so that a clip's weight does not depend on
    the other clips of its batch.

    Args:
      num_tokens: tokens per clip, one number for all or one per clip; the result has as many entries.
    """
    level = (jnp.arange(_LEVELS) + 0.5) / _LEVELS
    timestep = density.quantile(level[:, None], jnp.atleast_1d(jnp.asarray(num_tokens))[None])
    return weighting.weight(timestep).mean(0)
