"""The timesteps of a sampler."""

import dataclasses
from typing import Annotated, Literal, TypeAlias, get_args

import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.limits import SAMPLER_STEPS, SHIFT, check_fields
from vidgen.core.typing import Float
from vidgen.diffusion.shift import AnyShift, shift_at

__all__ = ["Convention", "TimeGrid"]

_TRAINED = 1000
"""Number of training timesteps of diffusers' and Wan's schedulers."""

Convention: TypeAlias = Literal["even", "unipc", "wan", "flow_match_euler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """Timesteps from 1 (noise) to 0 (data), moved towards noise by `shift`.

    Attributes:
      num_steps: of the sampler.
      shift: a number, or a rule that computes it from the size of the clip (`for_tokens`). None is 1; in the
        options of a `TextToVideoTask` None is the shift of the task's timestep density.
      convention: `even` is evenly spaced before the shift, from 1 to 0. The others reproduce the schedulers
        of other programs:
        `unipc` is diffusers' `UniPCMultistepScheduler` with flow sigmas: evenly spaced from 1 to 1 / 1000,
        then 0; it begins a millionth below its first timestep.
        `wan` is `FlowUniPCMultistepScheduler` of Wan's own program: evenly spaced from 999 / 1000 to 0.
        `flow_match_euler` is diffusers' `FlowMatchEulerDiscreteScheduler`: it shifts the last timestep before
        0 twice.
        `unipc` and `wan` round the network's timesteps down to 1/1000. At 50 steps and a shift of 5, 27 of
        their 50 rounded timesteps differ, by up to 4 / 1000.
    """

    num_steps: Annotated[int, SAMPLER_STEPS] = 30
    shift: Annotated[float, SHIFT] | AnyShift | None = None
    convention: Convention = "even"

    def __post_init__(self):
        check_fields(self)
        if self.convention not in get_args(Convention):
            raise UserError(
                f"convention={self.convention!r}: expected one of {', '.join(get_args(Convention))}"
            )

    def for_tokens(self, num_tokens: int) -> "TimeGrid":
        """The grid for clips of `num_tokens` tokens, with a number as shift."""
        shift = 1.0 if self.shift is None else float(shift_at(self.shift, num_tokens))
        return dataclasses.replace(self, shift=shift)

    def timesteps(self) -> Float[np.ndarray, "s"]:
        """The `num_steps` + 1 boundaries, decreasing from 1 (or a little less) to 0, float32."""
        return self._boundaries().astype(np.float32)

    def model_timesteps(self) -> Float[np.ndarray, "s"]:
        """Timesteps passed to the network: `timesteps()`, rounded down to 1/1000 for `unipc` and `wan`."""
        if self.convention in ("unipc", "wan"):
            return (np.floor(_TRAINED * self._boundaries()) / _TRAINED).astype(np.float32)
        return self.timesteps()

    def _boundaries(self) -> Float[np.ndarray, "s"]:
        n = self.num_steps
        if self.convention == "even":
            return self._shifted(np.linspace(1.0, 0.0, n + 1))
        if self.convention == "wan":
            # Wan's scheduler stores its first timestep in float32, which decides some roundings to 1/1000.
            return self._shifted(np.linspace(float(np.float32(1.0 - 1.0 / _TRAINED)), 0.0, n + 1))
        if self.convention == "unipc":
            t = self._shifted(np.linspace(1.0, 1.0 / _TRAINED, n + 1)[:-1])
            t[0] -= 1e-6  # Keeps the log signal-to-noise ratio finite.
        else:
            t = self._shifted(np.linspace(1.0, self._shifted(np.float32(1.0 / _TRAINED)), n))
        return np.append(t, 0.0)

    def _shifted(self, t: np.ndarray | np.floating) -> np.ndarray:
        shift = 1.0 if self.shift is None else self.shift
        if not isinstance(shift, int | float):
            raise UserError("the shift of this grid depends on the size: use grid.for_tokens(num_tokens)")
        return np.asarray(shift * t / (1.0 + (shift - 1.0) * t))
