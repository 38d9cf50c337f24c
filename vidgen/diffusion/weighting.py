"""Weights of the velocity loss by timestep. A clip's weight is its own, whatever it is batched with."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int
from vidgen.diffusion.timesteps import TimestepDensity

__all__ = ["AnyWeighting", "CosMap", "LossWeighting", "MinSNR", "mean_weight"]


@runtime_checkable
class LossWeighting(Protocol):
    """How much an error of the velocity counts at each timestep."""

    def weight(self, timestep: Float[Array, "..."]) -> Float[Array, "..."]:
        """Positive and finite for timesteps in (0, 1), up to a common factor."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosMap:
    """Times 2 / (pi (1 - 2 t + 2 t^2)): the middle counts twice as much as the ends.

    Under uniform timesteps this trains what the CosMap density would (arXiv 2403.03206, section 3.1).
    """

    kind: Literal["cosmap"] = "cosmap"

    def weight(self, timestep: Float[Array, "..."]) -> Float[Array, "..."]:
        return (2.0 / jnp.pi) / (1.0 - 2.0 * timestep * (1.0 - timestep))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNR:
    """The error of the clean prediction times min(SNR, gamma) (arXiv 2303.09556, section 3.4).

    With SNR = (1 - t)^2 / t^2, and an error of the clean prediction t times that of the velocity, the weight
    of the velocity loss is min((1 - t)^2, gamma t^2): zero at both ends.
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
    """The expected weight of timesteps drawn from `density`: divided by it, weights are 1 on average.

    It is an integral over the density, not a mean over the clips of a batch, by which the weight of a clip
    would depend on the others'.

    Args:
      num_tokens: the size of all clips, or of each; the result has one entry, or one for each.
    """
    level = (jnp.arange(_LEVELS) + 0.5) / _LEVELS
    timestep = density.quantile(level[:, None], jnp.atleast_1d(jnp.asarray(num_tokens))[None])
    return weighting.weight(timestep).mean(0)
