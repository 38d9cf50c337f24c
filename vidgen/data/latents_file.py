"""Latents of one video: a safetensors file, with a JSON file of metadata beside it."""

import dataclasses
import json
import pathlib
from typing import Annotated

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vidgen.ckpt.json_files import write_json
from vidgen.core import limits
from vidgen.core.config import resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import read_json, replacing
from vidgen.core.typing import Float

__all__ = ["LatentsInfo", "load_latents", "require_finite", "save_latents"]

_REMEDY = "write it again with `vidgen encode`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """Metadata of the latents of a video.

    Attributes:
      num_frames: frames of the video; latents may cover a few more, which repeat the last.
      height: pixels of the video; latents may cover a few more image rows, which repeat the last.
      width: as `height`, for image columns.
      fps: frames per second.
      vae: the autoencoder's folder, as specified when the latents were written.
      spatial_factor: pixels per latent pixel, per side.
      temporal_factor: frames per latent frame, after the first.
      source: path of the video.
    """

    num_frames: Annotated[int, limits.NUM_FRAMES]
    height: Annotated[int, limits.SIDE]
    width: Annotated[int, limits.SIDE]
    fps: Annotated[float, limits.FPS]
    vae: str
    spatial_factor: Annotated[int, limits.FACTOR]
    temporal_factor: Annotated[int, limits.FACTOR]
    source: str = ""


def save_latents(path: pathlib.Path | str, latents: Float[np.ndarray, "t h w c"], info: LatentsInfo) -> None:
    """Writes `path` (safetensors, one tensor `latents`) and the JSON file beside it, each atomically.

    Raises:
      UserError: the name does not end in `.safetensors`, or a file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: latents are written to .safetensors files")
    text = json.dumps(to_dict(info))
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save({"latents": np.ascontiguousarray(latents)}, metadata={"vidgen": text}))
        write_json(_json(path), to_dict(info))
    except OSError as error:  # the error of a full disk names no file
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def load_latents(path: pathlib.Path | str) -> tuple[Float[np.ndarray, "t h w c"], LatentsInfo]:
    """Reads latents and metadata written by `save_latents`.

    Raises:
      FileNotFoundError: one of the two files is missing.
      UserError: the files are damaged, do not hold latents, or hold latents that are not finite.
    """
    path = pathlib.Path(path)
    for file in (path, _json(path)):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: `vidgen encode` writes both files")
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # KeyError: a type that NumPy lacks
        raise UserError(f"{path} is no complete safetensors file ({error}): {_REMEDY}") from error
    values = read_json(_json(path), remedy=_REMEDY)
    info = resolve(LatentsInfo, values, where=str(_json(path)))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    # Padding repeats the last frame, image row and image column, at most up to a whole latent.
    frames = 1 + -(-(info.num_frames - 1) // info.temporal_factor)
    sides = (-(-side // info.spatial_factor) for side in (info.height, info.width))
    expected = (frames, *sides)
    if list(found) != ["latents"] or len(found["latents"]) != 4 or found["latents"][:3] != expected:
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in found.items()) or "nothing"
        raise UserError(
            f"{path} holds {shown}; expected latents {[*expected, 'channels']} alone, as in {_json(path)}: "
            f"{_REMEDY}"
        )
    if tensors["latents"].dtype.kind != "f":
        raise UserError(f"{path}: latents of type {tensors['latents'].dtype}, expected floats: {_REMEDY}")
    require_finite(tensors["latents"], info.temporal_factor, str(path))
    return tensors["latents"], info


def require_finite(latents: Float[np.ndarray, "t h w c"], temporal_factor: int, where: str) -> None:
    """Raises UserError if latents are not finite; names the first such latent frame and its video frames."""
    finite = np.isfinite(latents).all((1, 2, 3))
    if not finite.all():
        index = int(np.argmin(finite))
        first = max(0, 1 + (index - 1) * temporal_factor)
        frames = f"frames {first} to {index * temporal_factor}" if index else "frame 0"
        raise UserError(
            f"{where}: latent frame {index} ({frames}) is not finite. The VAE's weights may be damaged: do "
            "not trust its other outputs for these frames either"
        )


def _json(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
