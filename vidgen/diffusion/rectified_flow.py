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
    """Squared error of the predicted velocity, mean per clip, float32; to be averaged over clips evenly.

    Args:
      loss_mask: which latents the mean of a clip is over, at least one of each; None is all.
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
    """`velocity_loss` of clips that share rows, each with a timestep of its own.

    Args:
      network: velocity of the patch of each token, from noisy patches and the timestep of each clip.
      clean: the patches of each clip's latents; of padding, anything finite.
      timestep: of each clip of a row.
      segment_ids: which clip of the row a token belongs to, from 1 to g; 0 is padding.

    Returns:
      Squared error of each clip, mean over its tokens, float32; and which of the g clips a row has: the
      others' errors are 0, and the mean over clips is the sum over their number.
    """
    of_token = jnp.take_along_axis(jnp.pad(timestep, ((0, 0), (1, 0))), segment_ids, axis=1)
    t = of_token[..., None]
    predicted = network((1.0 - t) * clean + t * noise, timestep).astype(jnp.float32)
    errors = jnp.square(predicted - (noise - clean)).mean(-1)
    # Padding's row is all zeros, for there is no clip -1.
    belongs = jax.nn.one_hot(segment_ids - 1, timestep.shape[1])
    counts = belongs.sum(1)
    total = jnp.einsum("bs,bsg->bg", errors, belongs, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(counts, 1.0), counts > 0
