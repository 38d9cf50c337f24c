"""Options of the video VAE, and its named variants."""

import dataclasses
from typing import Annotated, Literal

from vidgen.core import limits
from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the causal 3D autoencoder, with the architecture of Wan 2.1 (arXiv 2503.20314).

    Attributes:
      base_dim: encoder channels at full (patched) resolution.
      decoder_base_dim: decoder channels at full (patched) resolution; None is `base_dim`.
      latent_channels: channels of the latents.
      dim_mult: channel multiplier of each level; height and width halve between levels.
      num_res_blocks: residual blocks per encoder level; decoder levels have one more.
      temporal_downsample: for each step between two levels, whether it also halves time.
      patch_size: side of the pixel blocks that are moved into channels before the first convolution.
      level_shortcuts: parameter-free skip connections around each level, as in Wan 2.2's VAE.
      latents_mean, latents_std: initial statistics of each latent channel, which training updates; () is 0
        and 1.
      dtype: compute dtype; weights are float32.
      remat: "full" recomputes each residual block in the backward pass.
    """

    base_dim: Annotated[int, limits.WIDTH] = 96
    decoder_base_dim: Annotated[int, limits.WIDTH] | None = None
    latent_channels: Annotated[int, limits.WIDTH] = 16
    dim_mult: tuple[Annotated[int, limits.PATCH], ...] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, limits.RES_BLOCKS] = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: Annotated[int, limits.PATCH] = 1
    level_shortcuts: bool = False
    latents_mean: tuple[Annotated[float, limits.STATISTIC], ...] = ()
    latents_std: tuple[Annotated[float, limits.POSITIVE], ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self):
        steps = len(self.dim_mult) - 1
        if not 0 <= steps < limits.MAX_LEVELS:
            raise UserError(f"dim_mult has {steps + 1} levels; expected 1 to {limits.MAX_LEVELS}")
        if len(self.temporal_downsample) != steps:
            raise UserError(
                f"temporal_downsample needs one entry for each of the {steps} steps between the levels of "
                f"dim_mult={self.dim_mult}, found {self.temporal_downsample}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries; expected one for each of the "
                    f"{self.latent_channels} latent channels"
                )

    @property
    def least_size(self) -> int:
        """Lower bound of the number of parameters, computed without building the model."""
        sides = (self.base_dim, self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim)
        widths = [base * factor for base in sides for factor in self.dim_mult]
        return sum(self.num_res_blocks * 27 * width**2 for width in widths)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, except that the first latent frame holds frame 0 alone."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along height and width."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (t, h, w, c) of a clip's latents.

        Raises:
          UserError: the VAE does not support the clip's size; names the nearest sizes that work.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal_factor:
            lower = max((num_frames - 1) // self.temporal_factor, 0) * self.temporal_factor + 1
            raise UserError(
                f"num_frames={num_frames} is not 1 + {self.temporal_factor} n; "
                f"use {lower} or {lower + self.temporal_factor}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial_factor:
                lower = size // self.spatial_factor * self.spatial_factor
                options = f"{lower} or {lower + self.spatial_factor}" if lower else f"{self.spatial_factor}"
                raise UserError(f"{name}={size} is not a multiple of {self.spatial_factor}; use {options}")
        return (
            (num_frames - 1) // self.temporal_factor + 1,
            height // self.spatial_factor,
            width // self.spatial_factor,
            self.latent_channels,
        )


# fmt: off
_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715,
    0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652,
    1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
    0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665,
    -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799,
    -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894,
    1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146,
    0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709,
    0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537,
    0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

VARIANTS: dict[str, VAEConfig] = {
    "wan2.1": VAEConfig(latents_mean=_WAN21_MEAN, latents_std=_WAN21_STD),
    "wan2.2": VAEConfig(
        base_dim=160,
        decoder_base_dim=256,
        latent_channels=48,
        patch_size=2,
        level_shortcuts=True,
        latents_mean=_WAN22_MEAN,
        latents_std=_WAN22_STD,
    ),
    # Higher compression for longer and larger clips: 8 frames per latent frame, as in LTX-Video
    # (arXiv 2501.00103).
    "base-8x16x16": VAEConfig(
        decoder_base_dim=128,
        latent_channels=64,
        temporal_downsample=(True, True, True),
        patch_size=2,
        level_shortcuts=True,
    ),
    "base-8x32x32": VAEConfig(
        decoder_base_dim=128,
        latent_channels=128,
        temporal_downsample=(True, True, True),
        patch_size=4,
        level_shortcuts=True,
    ),
    "small-8x16x16": VAEConfig(
        base_dim=32,
        latent_channels=32,
        num_res_blocks=1,
        temporal_downsample=(True, True, True),
        patch_size=2,
        level_shortcuts=True,
    ),
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
"""Shapes by name: Wan's fit Wan's weights, the others are for training from scratch. Pixels per latent pixel
(frames x rows x columns) are 4 x 8 x 8 unless the name gives them; `variants.py` prints them all."""
