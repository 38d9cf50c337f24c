"""Options of the patch discriminator, and its named variants."""

import dataclasses
from typing import Literal

from vidgen.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of a 3D patch discriminator (PatchGAN, Isola et al., arXiv:1611.07004, extended over time).

    Attributes:
      base_dim: channels after the first convolution.
      dim_mult: channel multiplier of each level; each level halves height and width.
      temporal_downsample: for each level, whether it also halves time.
      dtype: compute dtype; weights and logits are float32.
    """

    base_dim: int = 64
    dim_mult: tuple[int, ...] = (1, 2, 4, 8)
    temporal_downsample: tuple[bool, ...] = (False, True, True, False)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if not self.dim_mult:
            raise UserError("dim_mult is empty: a discriminator needs at least one level")
        if len(self.temporal_downsample) != len(self.dim_mult):
            raise UserError(
                f"temporal_downsample needs one entry for each of the {len(self.dim_mult)} levels of "
                f"dim_mult={self.dim_mult}, found {self.temporal_downsample}"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels per logit along height and width; also the smallest height and width of a video."""
        return 2 ** len(self.dim_mult)


VARIANTS: dict[str, DiscriminatorConfig] = {
    "base": DiscriminatorConfig(),
    "small": DiscriminatorConfig(base_dim=32, dim_mult=(1, 2, 4), temporal_downsample=(False, True, True)),
    "tiny": DiscriminatorConfig(base_dim=8, dim_mult=(1, 2), temporal_downsample=(False, True)),
}
"""Shapes by name: `base` for videos of 128 pixels and more, `small` for 64, `tiny` for tests."""
