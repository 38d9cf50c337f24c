"""Rectified flow: straight paths between data and noise (Liu et al., arXiv 2209.03003; arXiv 2403.03206)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Bool, Float, Int, Latents


def interpolate(clean: Latents, noise: Latents, timestep: Float[Array, "b"]) -> Latents:
    """x_t = (1 - t) x_0 + t noise."""
    t = timestep.reshape(-1, 1, 1, 1, 1)
    return (1.0 - t) * clean + t * noise


def velocity_loss(
    network: VelocityNetwork,
    clean: Latents,
    noise: Latents,
    timestep: Float[Array, "b"],
    loss_mask: Bool[Array, "b tz hz wz"] | None = None,
) -> Float[Array, "b"]:
    """Mean squared error of the predicted velocity of each clip, float32.

    Callers average it over clips with equal weights.

    Args:
      loss_mask: true for latents that count towards a clip's mean, at least one per clip; None is all.
    """
    predicted = network(interpolate(clean, noise, timestep), timestep).astype(jnp.float32)
    where = None if loss_mask is None else loss_mask[..., None]
    return jnp.square(predicted - (noise - clean)).mean((1, 2, 3, 4), where=where)


def packed_velocity_loss(
    network: Callable[[Float[Array, "b s p"], Float[Array, "b g"]], Float[Array, "b s p"]],
    clean: Float[Array, "b s p"],
    noise: Float[Array, "b s p"],
    timestep: Float[Array, "b g"],
    segment_ids: Int[Array, "b s"],
) -> tuple[Float[Array, "b g"], Bool[Array, "b g"]]:
    """`velocity_loss` of packed clips, each with a separate timestep.

    Args:
      network: maps noisy patches and the timesteps of the clips to the velocity of each patch.
      clean: patches of the clips' latents; padding may hold any finite values.
      timestep: timestep of each clip of a packed row.
      segment_ids: clip of each token, numbered from 1 to g within the packed row; 0 is padding.

    Returns:
      Mean squared error of each clip over its tokens, float32, and a mask of the clips present in each
      packed row. Absent clips have error 0: to average over clips, divide the sum by the number present.
    """
    token_timestep = jnp.take_along_axis(jnp.pad(timestep, ((0, 0), (1, 0))), segment_ids, axis=1)
    t = token_timestep[..., None]
    predicted = network((1.0 - t) * clean + t * noise, timestep).astype(jnp.float32)
    errors = jnp.square(predicted - (noise - clean)).mean(-1)
    # one_hot(-1) is all zeros, so padding counts for no clip.
    membership = jax.nn.one_hot(segment_ids - 1, timestep.shape[1])
    counts = membership.sum(1)
    total = jnp.einsum("bs,bsg->bg", errors, membership, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(counts, 1.0), counts > 0
