"""Rectified flow: straight paths between data and noise (Liu et al., arXiv 2209.03003; arXiv 2403.03206)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.tokens import Tokens
from vidgen.core.typing import Array, Bool, Float

__all__ = ["interpolate", "velocity_loss"]


def interpolate(tokens: Tokens, noise: Float[Array, "b s p"], timestep: Float[Array, "b g"]) -> Tokens:
    """Noisy tokens, x_t = (1 - t) x_0 + t noise, with the timestep t of each token; known ones stay clean."""
    levels, ids = tokens.noise_levels(timestep)
    # Padding has index -1; it may have any timestep.
    t = levels[:, :1] if ids is None else jnp.take_along_axis(levels, jnp.maximum(ids, 0), axis=1)
    return tokens._replace(patches=(1.0 - t[..., None]) * tokens.patches + t[..., None] * noise)


def velocity_loss(
    network: Callable[[Tokens, Float[Array, "b g"]], Float[Array, "b s p"]],
    tokens: Tokens,
    noise: Float[Array, "b s p"],
    timestep: Float[Array, "b g"],
) -> tuple[Float[Array, "b c"], Bool[Array, "b c"]]:
    """Mean squared error of the predicted velocity of each clip.

    Args:
      network: maps noisy tokens and the timesteps of the clips to the velocity of each patch.
      tokens: clean patches; those of padding may hold any finite values.
      timestep: timestep of each clip of a sequence, or what `tokens.time_ids` selects from.

    Returns:
      Error of each clip over its tokens in the loss, float32, and a mask of the clips present in each
      sequence. Absent clips have error 0: to average over clips, divide the sum by the number present.

    Raises:
      UserError: the tokens are packed and have `time_ids`: the number of clips is unknown.
    """
    if tokens.clip_ids is not None and tokens.time_ids is not None:
        raise UserError("velocity_loss: packed tokens have a timestep per clip; leave out time_ids")
    predicted = network(interpolate(tokens, noise, timestep), timestep).astype(jnp.float32)
    errors = jnp.square(predicted - (noise - tokens.patches)).mean(-1)
    membership, counted = tokens.of_clips(timestep.shape[1]), tokens.counted()
    if counted is not None:
        membership = membership & counted[..., None]
    weights = membership.astype(jnp.float32)
    counts = weights.sum(1)
    total = jnp.einsum("bs,bsg->bg", errors, weights, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(counts, 1.0), counts > 0
