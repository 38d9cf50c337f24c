"""Protocols shared by several layers of the package."""

from typing import Protocol, runtime_checkable

from vidgen.core.typing import Array, Float, Noisy


@runtime_checkable
class VelocityNetwork(Protocol):
    """A network with all inputs bound except latents and timestep, for diffusion and sampling."""

    def __call__(self, latents: Noisy, timestep: Float[Array, "b"], /) -> Noisy:
        """Velocity (noise - clean latents) of noisy latents at `timestep` in [0, 1] (1 is noise)."""
        ...
