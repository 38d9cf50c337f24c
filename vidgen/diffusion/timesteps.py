"""Densities from which training draws timesteps, in [0, 1], 1 being noise."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax

from vidgen.core.typing import Array, Float


def shift_timestep(timestep: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """Moves timesteps towards noise: t -> shift t / (1 + (shift - 1) t) (arXiv 2403.03206, section 5.3.2)."""
    return shift * timestep / (1.0 + (shift - 1.0) * timestep)


@runtime_checkable
class TimestepDensity(Protocol):
    """Where in time training looks."""

    def sample(self, key: Array, count: int) -> Float[Array, "b"]:
        """`count` independent timesteps in (0, 1), float32."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform timesteps, shifted."""

    kind: Literal["uniform"] = "uniform"
    shift: float = 1.0

    def sample(self, key: Array, count: int) -> Float[Array, "b"]:
        return shift_timestep(jax.random.uniform(key, (count,)), self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """The sigmoid of a normal variable, shifted (arXiv 2403.03206, section 3.1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def sample(self, key: Array, count: int) -> Float[Array, "b"]:
        normal = self.mean + self.std * jax.random.normal(key, (count,))
        return shift_timestep(jax.nn.sigmoid(normal), self.shift)
