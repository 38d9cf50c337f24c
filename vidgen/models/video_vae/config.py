"""Options of the video VAE, and its named variants."""

import dataclasses
from typing import Literal

from vidgen.nn.stack import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the causal 3D autoencoder; the structure is that of Wan 2.1's (arXiv 2503.20314).

    Attributes:
      base_dim: channels at full (patched) resolution.
      latent_channels: channels of the latents.
      dim_mult: channel multiplier of each level; between levels height and width halve.
      num_res_blocks: residual blocks per encoder level (the decoder has one more).
      temporal_downsample: for each of the steps between levels, whether time halves too.
      patch_size: pixels per side that are moved into channels before the first convolution.
      level_shortcuts: parameter-free skip connections around each level, as in Wan 2.2's VAE.
      dtype: compute dtype; weights are float32.
      remat: "full" recomputes each residual block in the backward pass.
    """

    base_dim: int = 96
    latent_channels: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    level_shortcuts: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        steps = len(self.dim_mult) - 1
        if len(self.temporal_downsample) != steps:
            raise ValueError(
                f"temporal_downsample needs one entry for each of the {steps} steps between the levels of "
                f"dim_mult={self.dim_mult}, found {self.temporal_downsample}"
            )

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first frame, which is a latent frame of its own."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, per side."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (t, h, w, c) of the latents of a clip.

        Raises:
          ValueError: the clip's size is not one that the VAE takes; names the nearest sizes.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal_factor:
            lower = max((num_frames - 1) // self.temporal_factor, 0) * self.temporal_factor + 1
            raise ValueError(
                f"num_frames={num_frames} is not 1 + {self.temporal_factor} n; "
                f"use {lower} or {lower + self.temporal_factor}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial_factor:
                lower = size // self.spatial_factor * self.spatial_factor
                options = f"{lower} or {lower + self.spatial_factor}" if lower else f"{self.spatial_factor}"
                raise ValueError(f"{name}={size} is not a multiple of {self.spatial_factor}; use {options}")
        return (
            (num_frames - 1) // self.temporal_factor + 1,
            height // self.spatial_factor,
            width // self.spatial_factor,
            self.latent_channels,
        )


VARIANTS: dict[str, VAEConfig] = {
    "wan2.1": VAEConfig(),
    "small": VAEConfig(
        base_dim=32,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        level_shortcuts=True,
    ),
    "nano": VAEConfig(
        base_dim=16,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        level_shortcuts=True,
    ),
    "tiny": VAEConfig(
        base_dim=8,
        latent_channels=8,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        level_shortcuts=True,
    ),
}
"""Shapes by name. All but the first are for training from scratch; all compress 4 x 8 x 8."""
