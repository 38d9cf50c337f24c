"""Two transformers, one for high and one for low noise levels, as in Wan 2.2's A14B."""

import jax
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.streams import Streams
from vidgen.core.tokens import Tokens
from vidgen.core.typing import Array, Float
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT, ResidualCache

__all__ = ["NoiseLevelExperts"]


class NoiseLevelExperts(nnx.Module):
    """Runs `high_noise` at timesteps of at least `boundary`, `low_noise` below; one expert runs per call.

    All clips of a batch must be at the same timestep, as they are in sampling.
    """

    def __init__(self, high_noise: DiT, low_noise: DiT, boundary: float):
        """Stores the experts.

        Args:
          boundary: timestep in (0, 1); 0.875 for Wan 2.2 T2V, 0.9 for I2V.

        Raises:
          UserError: the experts differ in config, or `boundary` is not in (0, 1).
        """
        if high_noise.config != low_noise.config:
            raise UserError(
                f"the experts differ in config: {high_noise.config} and {low_noise.config}; "
                "expected equal configs"
            )
        if not 0 < boundary < 1:
            raise UserError(f"boundary={boundary}: expected a timestep between 0 and 1")
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.boundary = boundary

    @property
    def config(self) -> DiTConfig:
        """Config of each expert."""
        return self.high_noise.config

    def __call__(
        self,
        tokens: Tokens,
        timestep: Float[Array, "b g"],
        streams: Streams,
        cache: ResidualCache | None = None,
    ) -> tuple[Float[Array, "b s q"], ResidualCache | None]:
        """Velocity, as from `DiT`; all latents except known ones must have the same timestep."""
        run = lambda expert: lambda: expert(tokens, timestep, streams, cache)  # noqa: E731
        is_high = timestep.max() >= self.boundary
        return jax.lax.cond(is_high, run(self.high_noise), run(self.low_noise))
