"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Latents, PyTree


def classifier_free_guidance(
    network: Callable[[Latents, Float[Array, "b"], PyTree], Latents],
    positive: PyTree,
    negative: PyTree,
    guidance_scale: float | Float[Array, ""],
) -> VelocityNetwork:
    """Velocity v_negative + scale (v_positive - v_negative), both computed in one call of twice the batch.

    Args:
      network: takes latents, timestep and a condition.
      positive, negative: conditions of equal structure, batch first.
      guidance_scale: 1 is the plain conditional model.
    """
    both = jax.tree.map(lambda p, n: jnp.concatenate([p, n]), positive, negative)

    def guided(latents: Latents, timestep: Float[Array, "b"]) -> Latents:
        doubled = network(jnp.concatenate([latents, latents]), jnp.concatenate([timestep, timestep]), both)
        conditional, unconditional = jnp.split(doubled, 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided
