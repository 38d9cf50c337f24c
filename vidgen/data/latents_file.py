"""Latents of a video in a file: safetensors, and beside it a JSON that says what they are of."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vidgen.core.config import resolve, to_dict
from vidgen.core.typing import Float

__all__ = ["LatentsInfo", "load_latents", "save_latents"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What latents are of.

    Attributes:
      num_frames: of the video; latents may stand for a few more, which repeat the last.
      height: pixels of the video; latents may stand for a few rows more, which repeat the last.
      width: as `height`.
      fps: frames per second.
      vae: the autoencoder's folder, as it was given.
      spatial_factor: pixels per latent pixel, per side.
      temporal_factor: frames per latent frame, after the first.
      source: the video's file.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    vae: str
    spatial_factor: int
    temporal_factor: int
    source: str = ""


def save_latents(path: pathlib.Path | str, latents: Float[np.ndarray, "t h w c"], info: LatentsInfo) -> None:
    """Writes `path` (safetensors, one tensor `latents`) and the JSON beside it; each appears whole.

    Raises:
      ValueError: the name does not end in `.safetensors`.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: latents are written to .safetensors files")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(info), indent=2) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    save_file({"latents": np.ascontiguousarray(latents)}, temporary, metadata={"vidgen": text})
    os.replace(temporary, path)
    temporary.write_text(text)
    os.replace(temporary, _json(path))


def load_latents(path: pathlib.Path | str) -> tuple[Float[np.ndarray, "t h w c"], LatentsInfo]:
    """What `save_latents` wrote.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: they are damaged, or do not hold latents.
    """
    path = pathlib.Path(path)
    for file in (path, _json(path)):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: `vidgen encode` writes it together with the other")
    try:
        latents = load_file(path)["latents"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no latents ({error}): write it again with `vidgen encode`") from error
    values: dict[str, Any] = json.loads(_json(path).read_text())
    return latents, resolve(LatentsInfo, values, where=str(_json(path)))


def _json(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
