"""A request for videos: prompts, images, size and sampling options."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vidgen.core.errors import UserError
from vidgen.core.files import require_text
from vidgen.core.typing import Float, UInt8
from vidgen.data.image_reader import fit_image, read_image
from vidgen.data.source import BrokenClip
from vidgen.diffusion.shift import AnyShift
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.guidance import AnyGuidance
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.steppers import AnyStepper, UniPC
from vidgen.sampling.time_grid import Convention

__all__ = ["AnyImage", "Request", "fitted_pixels"]

AnyImage: TypeAlias = pathlib.Path | str | Image.Image | UInt8[np.ndarray, "_h _w 3"]
"""A file, a PIL image, or pixels."""

_GRID = {"steps": "num_steps", "shift": "shift", "convention": "convention"}
_OPTIONS = ("stepper", "guidance_scale", "guidance_scale_2", "guidance", "guidance_interval", "cache")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One video for a prompt, or one for each of several prompts (seeds seed, seed + 1, ...).

    Fields that are None take the model's default.

    Attributes:
      prompt: text that describes the video, or several.
      negative_prompt: text that guidance steers away from.
      image: the first frame of all videos, for image-to-video models; cropped to the video's aspect.
      last_image: the last frame, for models conditioned by concatenated channels.
      num_frames: 1 + 4 n for the default VAE; 1 gives an image.
      height, width: in pixels, multiples of the VAE's factor times the transformer's patch size.
      steps: of the sampler.
      guidance_scale: 1 turns guidance off.
      guidance_scale_2: scale for the low-noise transformer of two; by default `guidance_scale`.
      guidance: rule that combines the velocities with and without the prompt.
      guidance_interval: range of timesteps, from 0 (data) to 1 (noise), with guidance.
      shift: moves the sampler's timesteps towards noise; for sizes larger than those of training.
      stepper: integrator.
      convention: of the timesteps, as in `TimeGrid`; with a new stepper `even`, or `unipc` for `UniPC`.
      cache: reuses the residual of the transformer's blocks in similar steps.
      seed: the same seed gives the same video on any number of devices.
      noise: initial noise, in the shape of the latents, instead of noise from the seed.
      extras: inputs of conditioners of users' own, by name.
    """

    prompt: str | Sequence[str]
    negative_prompt: str = ""
    image: AnyImage | None = None
    last_image: AnyImage | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance: AnyGuidance | None = None
    guidance_interval: tuple[float, float] | None = None
    shift: float | AnyShift | None = None
    stepper: AnyStepper | None = None
    convention: Convention | None = None
    cache: TeaCache | None = None
    seed: int = 0
    noise: Float[np.ndarray, "b tz hz wz z"] | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        examples = {"stepper": "Euler()", "guidance": "ClassifierFree()", "cache": "TeaCache()"}
        for name, example in examples.items():
            if isinstance(getattr(self, name), str | int | float):
                raise UserError(f"{name}={getattr(self, name)!r}: give an object, for instance {example}")
        if not isinstance(self.seed, int | np.integer):
            raise UserError(f"seed={self.seed!r}: expected a whole number")
        if not isinstance(self.prompt, str | Sequence) or not self.prompts:
            raise UserError("found no prompt: give at least one")
        for name, text in (("negative_prompt", self.negative_prompt), *(("prompt", x) for x in self.prompts)):
            if not isinstance(text, str):
                raise UserError(f"{name}: found {text!r}, expected text")
            require_text(text, name)

    @property
    def prompts(self) -> list[str]:
        """One prompt per video."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def size(self, default: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width."""
        given = (self.num_frames, self.height, self.width)
        frames, height, width = (d if g is None else g for g, d in zip(given, default, strict=True))
        return frames, height, width

    def options(self, default: SamplingOptions) -> SamplingOptions:
        """Sampling options: those of the request, and `default` for those that are None."""
        grid = {name: getattr(self, field) for field, name in _GRID.items()}
        if self.convention is None and self.stepper is not None and self.stepper != default.stepper:
            grid["convention"] = "unipc" if isinstance(self.stepper, UniPC) else "even"
        if self.guidance_scale is not None and self.guidance_scale_2 is None:
            default = dataclasses.replace(default, guidance_scale_2=None)
        return dataclasses.replace(
            default,
            grid=dataclasses.replace(default.grid, **_without_none(grid)),
            **_without_none({name: getattr(self, name) for name in _OPTIONS}),
        )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def fitted_pixels(image: AnyImage, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an image, resized and center-cropped to `size` if it is given.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file is no image.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return fit_image(image, size)
    path = pathlib.Path(image)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such image")
    try:
        return read_image(path, size=size)
    except BrokenClip as error:
        raise UserError(str(error)) from error
