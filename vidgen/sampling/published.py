"""Sampling defaults published with open weights, by the names in `vidgen.models.dit.config.VARIANTS`."""

import dataclasses
from typing import Annotated

from vidgen.core.limits import FPS, NUM_FRAMES, SIDE, check_fields
from vidgen.models.dit.config import VARIANTS, DiTConfig
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.steppers import UniPC
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["PUBLISHED", "SamplingDefaults", "published"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Default size, frame rate and sampling options of a model.

    Attributes:
      num_frames, height, width: size of a video, in frames and pixels.
      fps: frames per second.
      options: of the sampler.
    """

    num_frames: Annotated[int, NUM_FRAMES]
    height: Annotated[int, SIDE]
    width: Annotated[int, SIDE]
    fps: Annotated[float, FPS]
    options: SamplingOptions = SamplingOptions()

    def __post_init__(self):
        check_fields(self)

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.num_frames, self.height, self.width


def _wan(
    *,
    steps: int,
    shift: float,
    scale: float,
    scale_2: float | None = None,
    size: tuple[int, int, int] = (81, 480, 832),
    fps: float = 16.0,
) -> SamplingDefaults:
    options = SamplingOptions(
        grid=TimeGrid(num_steps=steps, shift=shift, convention="wan"),
        stepper=UniPC(),
        guidance_scale=scale,
        guidance_scale_2=scale_2,
    )
    return SamplingDefaults(num_frames=size[0], height=size[1], width=size[2], fps=fps, options=options)


PUBLISHED: dict[str, SamplingDefaults] = {
    "wan2.1-t2v-1.3b": _wan(steps=50, shift=5.0, scale=5.0),
    "wan2.1-t2v-14b": _wan(steps=50, shift=5.0, scale=5.0),
    "wan2.1-i2v-14b": _wan(steps=40, shift=3.0, scale=5.0),  # at 720 x 1280 a shift of 5
    "wan2.1-flf2v-14b": _wan(steps=50, shift=16.0, scale=5.0),
    "wan2.2-ti2v-5b": _wan(steps=50, shift=5.0, scale=5.0, size=(121, 704, 1280), fps=24.0),
    # Two transformers: the scale for high noise, then the scale for low noise.
    "wan2.2-t2v-a14b": _wan(steps=40, shift=12.0, scale=4.0, scale_2=3.0),
    "wan2.2-i2v-a14b": _wan(steps=40, shift=5.0, scale=3.5, scale_2=3.5),
}
"""Defaults of Wan's own programs (Wan2.1: generate.py; Wan2.2: wan/configs), at the smallest size that they
list for a model. The README of Wan 2.1 recommends a scale of 6 and a shift of 8 to 12 for T2V 1.3B."""


def published(dit: DiTConfig, *, experts: bool) -> SamplingDefaults | None:
    """Published defaults of the variant with the transformer's shape; None if no variant has it.

    Args:
      experts: whether the model has two transformers, one for high and one for low noise.
    """
    for name, row in PUBLISHED.items():
        if name.endswith("a14b") == experts and _shape(VARIANTS[name]) == _shape(dit):
            return row
    return None


def _shape(dit: DiTConfig) -> tuple[object, ...]:
    return (
        dit.in_channels,
        dit.velocity_channels,
        dit.model_dim,
        dit.num_layers,
        dit.num_heads,
        dit.ffn_dim,
        dit.image_dim,
        dit.image_positions,
    )
