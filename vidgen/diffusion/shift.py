"""Timestep shifts by clip size: with more tokens, the same destruction of the signal needs more noise."""

import dataclasses
import math
from typing import Literal, Protocol, runtime_checkable

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int

__all__ = ["AnyShift", "GeometricShift", "RootShift", "Shift", "shift_at", "shift_timestep"]


def shift_timestep(timestep: Float[Array, "..."], shift: float | Float[Array, "..."]) -> Float[Array, "..."]:
    """Moves timesteps towards noise: t -> shift t / (1 + (shift - 1) t) (arXiv 2403.03206, section 5.3.2)."""
    return shift * timestep / (1.0 + (shift - 1.0) * timestep)


@runtime_checkable
class Shift(Protocol):
    """Maps a clip's number of tokens to its shift."""

    def at(self, num_tokens: int | Int[Array, "..."]) -> float | Float[Array, "..."]:
        """Shift for clips of `num_tokens` tokens: a float for an int, an array for an array."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootShift:
    """Shift proportional to the square root of the number of tokens (arXiv 2403.03206, section 5.3.2).

    Attributes:
      base_tokens: number of tokens at which the shift is `base_shift`.
    """

    kind: Literal["root"] = "root"
    base_tokens: int
    base_shift: float = 1.0

    def __post_init__(self):
        _check_positive(self, "base_tokens", "base_shift")

    def at(self, num_tokens: int | Int[Array, "..."]) -> float | Float[Array, "..."]:
        return self.base_shift * (num_tokens / self.base_tokens) ** 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricShift:
    """Shift interpolated geometrically between two numbers of tokens, and extrapolated beyond them.

    The logarithm of the shift is linear in the number of tokens. The defaults are Flux's sampling schedule
    (diffusers' schedulers call the logarithm mu: 0.5 at 256 tokens, 1.15 at 4096).
    """

    kind: Literal["geometric"] = "geometric"
    base_tokens: int = 256
    base_shift: float = math.exp(0.5)
    max_tokens: int = 4096
    max_shift: float = math.exp(1.15)

    def __post_init__(self):
        _check_positive(self, "base_tokens", "base_shift", "max_shift")
        if self.max_tokens <= self.base_tokens:
            raise UserError(f"max_tokens={self.max_tokens} must be above base_tokens={self.base_tokens}")

    def at(self, num_tokens: int | Int[Array, "..."]) -> float | Float[Array, "..."]:
        fraction = (num_tokens - self.base_tokens) / (self.max_tokens - self.base_tokens)
        return self.base_shift * (self.max_shift / self.base_shift) ** fraction


AnyShift = RootShift | GeometricShift


def shift_at(shift: float | AnyShift, num_tokens: int | Int[Array, "..."]) -> float | Float[Array, "..."]:
    """Shift for clips of `num_tokens` tokens; a number is a constant shift."""
    return shift if isinstance(shift, int | float) else shift.at(num_tokens)


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) <= 0:
            raise UserError(f"{name}={getattr(options, name)} must be positive")
