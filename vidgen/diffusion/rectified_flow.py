"""Rectified flow: straight paths between data and noise (Liu et al., arXiv 2209.03003; arXiv 2403.03206)."""

import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Latents


def interpolate(clean: Latents, noise: Latents, timestep: Float[Array, "b"]) -> Latents:
    """x_t = (1 - t) x_0 + t noise."""
    t = timestep.reshape(-1, 1, 1, 1, 1)
    return (1.0 - t) * clean + t * noise


def velocity_loss(
    network: VelocityNetwork, clean: Latents, noise: Latents, timestep: Float[Array, "b"]
) -> Float[Array, "b"]:
    """Squared error of the predicted velocity, mean per clip, float32; to be averaged over clips evenly."""
    predicted = network(interpolate(clean, noise, timestep), timestep).astype(jnp.float32)
    return jnp.square(predicted - (noise - clean)).mean((1, 2, 3, 4))
