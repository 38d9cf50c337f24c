"""Roles that more than one layer speaks of."""

from typing import Protocol, runtime_checkable

from vidgen.core.typing import Array, Float, Latents


@runtime_checkable
class VelocityNetwork(Protocol):
    """A network as diffusion and sampling see it: everything but latents and timestep is bound already."""

    def __call__(self, latents: Latents, timestep: Float[Array, "b"], /) -> Latents:
        """Velocity, noise - clean latents, for noisy latents at `timestep` in [0, 1] (1 is noise)."""
        ...
