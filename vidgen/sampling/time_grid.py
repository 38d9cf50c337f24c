"""The timesteps that a sampler visits."""

import dataclasses

import numpy as np

from vidgen.core.typing import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """Evenly spaced timesteps from 1 (noise) to 0, moved towards noise by `shift`."""

    num_steps: int = 30
    shift: float = 1.0

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: sampling needs at least one step")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be positive; 1 leaves the grid evenly spaced")

    def timesteps(self) -> Float[np.ndarray, "s"]:
        """The `num_steps` + 1 boundaries, decreasing from 1 to 0, float32."""
        t = np.linspace(1.0, 0.0, self.num_steps + 1)
        return (self.shift * t / (1.0 + (self.shift - 1.0) * t)).astype(np.float32)
