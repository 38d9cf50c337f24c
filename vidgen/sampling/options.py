"""Sampling options, which are saved with a run and written to exports."""

import dataclasses
from typing import Annotated

from vidgen.core.errors import UserError
from vidgen.core.limits import GUIDANCE_SCALE, TIMESTEP, check_fields
from vidgen.diffusion.shift import AnyShift
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.guidance import AnyGuidance, ClassifierFree
from vidgen.sampling.steppers import AnyStepper, DPMSolver
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["SamplingOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for sampling videos from noise.

    Attributes:
      grid: timesteps of the sampler.
      stepper: integrator.
      guidance_scale: 1 is no guidance, at half the cost.
      guidance_scale_2: scale for the low-noise transformer of a model with two; None is `guidance_scale`.
      guidance: rule that combines the velocities with and without the prompt.
      guidance_interval: (low, high): guidance at timesteps low < t <= high (arXiv 2404.07724); steps that
        begin outside cost half.
      cache: reuses the residual of the transformer's blocks from earlier steps; None computes every step.
    """

    grid: TimeGrid = TimeGrid()
    stepper: AnyStepper = DPMSolver()
    guidance_scale: Annotated[float, GUIDANCE_SCALE] = 4.0
    guidance_scale_2: Annotated[float, GUIDANCE_SCALE] | None = None
    guidance: AnyGuidance = ClassifierFree()
    guidance_interval: tuple[Annotated[float, TIMESTEP], Annotated[float, TIMESTEP]] = (0.0, 1.0)
    cache: TeaCache | None = None

    def __post_init__(self):
        check_fields(self)
        low, high = self.guidance_interval
        if low >= high:
            raise UserError(
                f"guidance_interval={self.guidance_interval}: expected 0 <= low < high <= 1; "
                "guidance_scale=1 is no guidance"
            )

    def with_default_shift(self, shift: float | AnyShift) -> "SamplingOptions":
        """The options with `shift` as the grid's shift if it is None."""
        if self.grid.shift is not None:
            return self
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, shift=shift))
