"""Feature caching: steps that skip the transformer's blocks and add their last residual again."""

import dataclasses
import math
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.limits import FINITE, NON_NEGATIVE, check_fields
from vidgen.core.typing import Array, Bool, Float, Int, Latents, PyTree
from vidgen.models.condition import Condition
from vidgen.models.dit.model import DiT
from vidgen.models.text_to_video import TextToVideo
from vidgen.parallel.rules import constrain

__all__ = ["CachePolicy", "CachedDenoiser", "TeaCache"]


@runtime_checkable
class CachePolicy(Protocol):
    """Chooses the steps that compute the blocks."""

    def computed(
        self, dit: DiT, timesteps: Float[Array, "s"], forced: Bool[np.ndarray, "s"]
    ) -> Bool[Array, "s"]:
        """Whether each step computes the blocks, from the model's timesteps; `forced` steps do."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeaCache:
    """Computes again when the timestep's modulation has changed enough (arXiv 2411.19108).

    The change from step to step is the relative L1 distance of the modulation vectors that all blocks share,
    as in the paper's implementation for Wan, and is summed until it reaches the threshold. It depends on the
    timesteps and the weights alone: all clips of a batch, with a prompt and without, reuse the same steps,
    and no video depends on what it is sampled with.

    Attributes:
      threshold: more is faster and less faithful; at 0 every step is computed.
      coefficients: of the polynomial that makes the change of the blocks' output of the distance, highest
        power first; empty takes the distance itself.
    """

    kind: Literal["teacache"] = "teacache"
    threshold: Annotated[float, NON_NEGATIVE] = 0.1
    coefficients: tuple[Annotated[float, FINITE], ...] = ()

    def __post_init__(self):
        check_fields(self)

    def computed(
        self, dit: DiT, timesteps: Float[Array, "s"], forced: Bool[np.ndarray, "s"]
    ) -> Bool[Array, "s"]:
        _, modulation = dit.condition_embedder.time(timesteps[:, None])
        modulation = modulation.reshape(len(timesteps), -1)
        size = jnp.abs(modulation).mean(1)
        distance = jnp.abs(jnp.diff(modulation, axis=0)).mean(1) / jnp.maximum(size[:-1], 1e-12)
        if self.coefficients:
            distance = jnp.polyval(jnp.asarray(self.coefficients), distance)

        def body(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            distance, must = inputs
            compute = must | (total + distance >= self.threshold) | (self.threshold == 0.0)
            return jnp.where(compute, 0.0, total + distance), compute

        inputs = (jnp.concatenate([jnp.zeros(1), distance]), jnp.asarray(forced))
        return jax.lax.scan(body, jnp.zeros(()), inputs)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedDenoiser:
    """A denoiser that reuses what the blocks added to the tokens in an earlier step.

    Attributes:
      computed: whether each step computes the blocks; the first one does.
    """

    model: TextToVideo
    computed: Bool[Array, "s"]

    def init(self, latents: Latents) -> PyTree:
        config = self.model.dit.config
        num_tokens = math.prod(config.token_grid(*latents.shape[1:4]))
        added = jnp.zeros((len(latents), num_tokens, config.model_dim), config.dtype)
        return constrain(added, "batch", "tokens", None)

    def apply(
        self,
        latents: Latents,
        timestep: Float[Array, "b"],
        condition: Condition,
        state: PyTree,
        step: Int[Array, ""],
    ) -> tuple[Latents, PyTree]:
        left: list[Array] = []

        def run_blocks(dit: DiT, x: Array, conditions: dict[str, Any]) -> Array:
            def compute(x: Array, added: Array) -> tuple[Array, Array]:
                out = dit.apply_blocks(x, conditions)
                return out, out - x

            def reuse(x: Array, added: Array) -> tuple[Array, Array]:
                return x + added, added

            x, added = jax.lax.cond(self.computed[step], compute, reuse, x, state)
            left.append(added)
            return x

        velocity = self.model.velocity(latents, timestep, condition, run_blocks)
        return velocity, left[0]
