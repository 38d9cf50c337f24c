"""Densities of training timesteps, in [0, 1], where 1 is pure noise."""

import dataclasses
import math
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int
from vidgen.diffusion.shift import AnyShift, shift_at, shift_timestep

__all__ = ["AnyDensity", "LogitNormal", "Mode", "TimestepDensity", "Uniform"]


@runtime_checkable
class TimestepDensity(Protocol):
    """Distribution of training timesteps.

    Attributes:
      shift: towards noise; the default shift of sampling.
    """

    @property
    def shift(self) -> float | AnyShift: ...

    def sample(
        self,
        key: Array,
        count: int,
        num_tokens: int | Int[Array, "b"],
        strata: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b"]:
        """Draws `count` timesteps in [0, 1], float32.

        Args:
          num_tokens: tokens per clip, one number for all or one per clip.
          strata: for stratified densities, the stratum of each timestep, a permutation of 0 to `count` - 1;
            None is in order.
        """
        ...

    def quantile(
        self, level: Float[Array, "..."], num_tokens: int | Int[Array, "..."]
    ) -> Float[Array, "..."]:
        """Quantile function: the timestep below which a draw falls with probability `level`, in (0, 1)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shifted:
    """Base of all densities: sampling maps uniform levels through the quantile function.

    Attributes:
      shift: moves timesteps towards noise, by a constant or by the clip's number of tokens.
      stratified: spaces the levels of a batch evenly, with one random offset (arXiv 2107.00630, section
        I.1): each clip's timestep has the same density, and the batch mean of the loss varies less.
      between: interval of the timesteps, such as (0.875, 1) or (0, 0.875) for an expert of Wan 2.2's A14B.
        The density is truncated to it and renormalised.
    """

    shift: float | AnyShift = 1.0
    stratified: bool = False
    between: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0.0 <= self.between[0] < self.between[1] <= 1.0:
            raise UserError(f"between={self.between}: expected 0 <= low < high <= 1")
        if isinstance(self.shift, int | float) and self.shift <= 0:
            raise UserError(f"shift={self.shift} must be positive; 1 leaves the density as it is")

    def sample(
        self,
        key: Array,
        count: int,
        num_tokens: int | Int[Array, "b"],
        strata: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b"]:
        if self.stratified:
            index = jnp.arange(count) if strata is None else strata
            level = (jax.random.uniform(key) + index / count) % 1.0
        else:
            level = jax.random.uniform(key, (count,))
        # At levels 0 and 1, intermediate values of a quantile function may be infinite.
        return self.quantile(jnp.clip(level, 2.0**-24, 1.0 - 2.0**-24), num_tokens)

    def quantile(
        self, level: Float[Array, "..."], num_tokens: int | Int[Array, "..."]
    ) -> Float[Array, "..."]:
        if self.between == (0.0, 1.0):
            return self._untruncated(level, num_tokens)
        low, high = (self._level_at(t, num_tokens) for t in self.between)
        return jnp.clip(self._untruncated(low + (high - low) * level, num_tokens), *self.between)

    def _untruncated(
        self, level: Float[Array, "..."], num_tokens: int | Int[Array, "..."]
    ) -> Float[Array, "..."]:
        """Quantile function over all of [0, 1], without `between`."""
        return shift_timestep(self._unshifted(level), shift_at(self.shift, num_tokens))

    def _level_at(self, timestep: float, num_tokens: int | Int[Array, "..."]) -> Float[Array, "..."]:
        """Probability of a timestep below `timestep`, by bisection of the quantile function."""
        low = jnp.zeros(jnp.shape(num_tokens))
        high = low + 1.0
        for _ in range(24):  # As many as the mantissa of a float32 has bits.
            middle = 0.5 * (low + high)
            below = self._untruncated(middle, num_tokens) < timestep
            low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
        # Levels 0 and 1 are excluded: quantile functions may be infinite there.
        return jnp.clip(0.5 * (low + high), 2.0**-24, 1.0 - 2.0**-24)

    def _unshifted(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_Shifted):
    """Uniform timesteps, shifted."""

    kind: Literal["uniform"] = "uniform"

    def _unshifted(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        return level


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal(_Shifted):
    """Sigmoid of a normal variable, shifted (arXiv 2403.03206, section 3.1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def _unshifted(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(level))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(_Shifted):
    """Density with its mode in the middle that stays positive at both ends (arXiv 2403.03206, section 3.1).

    Attributes:
      scale: in [-1, 2 / (pi - 2)], about [-1, 1.75]; 0 is uniform, above 0 favours the middle, below 0 the
        ends.
    """

    kind: Literal["mode"] = "mode"
    scale: float = 1.29

    def __post_init__(self):
        super().__post_init__()
        largest = 2.0 / (math.pi - 2.0)
        if not -1.0 <= self.scale <= largest:
            raise UserError(f"scale={self.scale}: the mode density takes scales in [-1, {largest:.4f}]")

    def _unshifted(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        return level - self.scale * (jnp.square(jnp.sin(0.5 * jnp.pi * level)) - level)


AnyDensity = LogitNormal | Uniform | Mode | TimestepDensity
