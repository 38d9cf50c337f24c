"""The timesteps that a sampler visits."""

import dataclasses
from typing import Literal

import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Float
from vidgen.diffusion.shift import AnyShift, shift_at

_TRAINED = 1000
"""Timesteps of the schedulers whose conventions are followed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """Timesteps from 1 (noise) to 0, moved towards noise by `shift`.

    Attributes:
      shift: a number, or a rule by which it follows the size of the clip (`for_tokens`).
      convention: `even` is evenly spaced before the shift. The others are those of schedulers of diffusers,
        for results that equal theirs: `unipc` (`UniPCMultistepScheduler` with flow sigmas; Wan's own) begins
        a little below 1, goes down to 1 / 1000 before 0, and tells the network thousandths, rounded down;
        `flow_match_euler` (`FlowMatchEulerDiscreteScheduler`) shifts the last timestep before 0 twice.
    """

    num_steps: int = 30
    shift: float | AnyShift = 1.0
    convention: Literal["even", "unipc", "flow_match_euler"] = "even"

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"num_steps={self.num_steps}: sampling needs at least one step")
        if isinstance(self.shift, int | float) and self.shift <= 0:
            raise UserError(f"shift={self.shift} must be positive; 1 leaves the grid evenly spaced")

    def for_tokens(self, num_tokens: int) -> "TimeGrid":
        """The grid for clips of so many tokens, whose shift is a number."""
        return dataclasses.replace(self, shift=float(shift_at(self.shift, num_tokens)))

    def timesteps(self) -> Float[np.ndarray, "s"]:
        """The `num_steps` + 1 boundaries, decreasing from 1 (or a little less) to 0, float32."""
        return self._boundaries().astype(np.float32)

    def told(self) -> Float[np.ndarray, "s"]:
        """What the network is told at each of the boundaries, float32."""
        if self.convention == "unipc":
            return (np.floor(_TRAINED * self._boundaries()) / _TRAINED).astype(np.float32)
        return self.timesteps()

    def _boundaries(self) -> Float[np.ndarray, "s"]:
        n = self.num_steps
        if self.convention == "even":
            return self._shifted(np.linspace(1.0, 0.0, n + 1))
        if self.convention == "unipc":
            t = self._shifted(np.linspace(1.0, 1.0 / _TRAINED, n + 1)[:-1])
            t[0] -= 1e-6  # Its logarithm of the signal-to-noise ratio is taken.
        else:
            t = self._shifted(np.linspace(1.0, self._shifted(np.float32(1.0 / _TRAINED)), n))
        return np.append(t, 0.0)

    def _shifted(self, t: np.ndarray | np.floating) -> np.ndarray:
        if not isinstance(self.shift, int | float):
            raise UserError("the shift of this grid depends on the size: use grid.for_tokens(num_tokens)")
        return np.asarray(self.shift * t / (1.0 + (self.shift - 1.0) * t))
