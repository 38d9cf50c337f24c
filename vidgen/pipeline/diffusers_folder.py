"""Reads whole models in diffusers' layout: model_index.json and one folder per part."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.config_values import ConfigValues
from vidgen.ckpt.pretrained import load_module
from vidgen.core import limits
from vidgen.core.config import resolve
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.clip import transformers_folder as clip_folder
from vidgen.models.clip.model import CLIPVision
from vidgen.models.dit import diffusers_folder as dit_folder
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.model import DiT
from vidgen.models.t5.prompts import T5Prompts
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae import diffusers_folder as vae_folder
from vidgen.parallel.rules import shardings
from vidgen.pipeline.pipeline import Pipeline
from vidgen.pipeline.sampling_file import read_defaults, read_scheduler
from vidgen.sampling.conditioners import ClipImages, ConcatFrames, FirstFrame, Prompts
from vidgen.sampling.conditioning import Conditioner
from vidgen.train.text_features import TextFeatures

__all__ = [
    "INDEX",
    "PARTS",
    "is_checkpoint",
    "load_checkpoint",
    "load_transformers",
    "read_index",
]

INDEX = "model_index.json"
PARTS = (
    "transformer",
    "transformer_2",
    "vae",
    "text_encoder",
    "tokenizer",
    "byte_encoder",
    "image_encoder",
    "image_processor",
    "scheduler",
)
"""Folders of a checkpoint; only models trained by vidgen have `byte_encoder`."""

_CLASSES = ("WanPipeline", "WanImageToVideoPipeline")
_DTYPE = Literal["float32", "bfloat16"]


def is_checkpoint(folder: pathlib.Path | str) -> bool:
    """Whether `folder` holds a whole diffusers model, of any kind."""
    return (pathlib.Path(folder) / INDEX).exists()


def load_checkpoint(
    folder: pathlib.Path | str,
    mesh: Mesh,
    *,
    dtype: _DTYPE = "float32",
    cache: pathlib.Path | str | None = None,
) -> Pipeline:
    """Loads the Wan 2.1 or 2.2 model in `folder`; the VAE is float32, the text encoder loads on first use.

    Args:
      mesh: the weights are sharded over it.
      dtype: of matrix products, and of the stored matrices of the transformer and the encoders.
      cache: folder that caches prompt features; None caches none.

    Raises:
      FileNotFoundError: a part is missing.
      UserError: the model is of another kind, or needs a feature that is not supported.
      WeightsError: lists every tensor that is missing, unexpected or of another shape.
    """
    folder = pathlib.Path(folder)
    index = read_index(folder)
    read_scheduler(folder / "scheduler")  # Raises its errors before the weights are read.
    text = _byte_encoder(folder / "byte_encoder", mesh)
    model = TextToVideo(load_transformers(folder, mesh, dtype=dtype), text)
    vae = vae_folder.load_diffusers(folder / "vae")
    encoder = None
    if (index.get("image_encoder") or [None])[0] is not None:
        encoder = clip_folder.load_transformers(folder / "image_encoder", mesh, dtype=dtype)
    experts = isinstance(model.dit, NoiseLevelExperts)
    defaults = read_defaults(folder, model.dit.config, vae.config, experts=experts)
    return Pipeline(
        model,
        jax.device_put(vae, shardings(vae, mesh)),
        [
            Prompts(encode=_prompts(folder, mesh, dtype, cache) if text is None else BytePrompts(model)),
            *_conditioners(model.dit.config, encoder, index),
        ],
        size=defaults.size,
        fps=defaults.fps,
        mesh=mesh,
        options=defaults.options,
    )


def read_index(folder: pathlib.Path | str) -> dict[str, Any]:
    """The validated contents of model_index.json.

    Raises:
      FileNotFoundError: the file is missing.
      UserError: the model is of another kind, or a value is wrong.
    """
    path = pathlib.Path(folder) / INDEX
    index = read_json(path, remedy="give the folder of a whole checkpoint of Wan for diffusers")
    if index.get("_class_name") not in _CLASSES:
        found = str(index.get("_class_name"))[:80]
        raise UserError(f"{path} is of {found!r}; expected one of {', '.join(_CLASSES)}")
    for name in PARTS:
        part = index.get(name, [None, None])
        pair = isinstance(part, list) and len(part) == 2
        if not pair or not all(item is None or isinstance(item, str) for item in part):
            raise UserError(f"{path}: {name} is {str(part)[:80]}; expected a library and a class")
    config = ConfigValues(index, str(path))
    config.number("boundary_ratio", limits.TIMESTEP, default=None)
    config.flag("expand_timesteps", False)
    return index


def load_transformers(
    folder: pathlib.Path | str, mesh: Mesh, *, dtype: _DTYPE = "float32"
) -> DiT | NoiseLevelExperts:
    """Loads the transformer of a checkpoint, or its two experts.

    Raises:
      FileNotFoundError, UserError, WeightsError: as in `load_checkpoint`.
    """
    folder = pathlib.Path(folder)
    index = read_index(folder)
    load = functools.partial(dit_folder.load_diffusers, mesh=mesh, dtype=dtype)
    if (index.get("transformer_2") or [None])[0] is None:
        return load(folder / "transformer")
    boundary = index.get("boundary_ratio")
    if boundary is None:
        raise UserError(f"{folder / INDEX} has transformer_2, but no boundary_ratio between the two")
    return NoiseLevelExperts(load(folder / "transformer"), load(folder / "transformer_2"), float(boundary))


def _byte_encoder(folder: pathlib.Path, mesh: Mesh) -> ByteEncoder | None:
    """Loads the byte encoder of a model trained by vidgen; None if `folder` does not exist."""
    if not folder.is_dir():
        return None
    described = folder / "config.json"
    values = read_json(described, remedy="export the model again")
    config = resolve(ByteEncoderConfig, values, where=str(described))
    path = folder / "model.safetensors"
    return load_module(path, lambda: ByteEncoder(config, rngs=nnx.Rngs(0)), mesh=mesh)


def _prompts(folder: pathlib.Path, mesh: Mesh, dtype: _DTYPE, cache: pathlib.Path | str | None) -> T5Prompts:
    return TextFeatures(path=str(folder), cache=None if cache is None else str(cache), dtype=dtype).prompts(
        mesh
    )


def _conditioners(
    dit: DiTConfig, encoder: CLIPVision | None, index: Mapping[str, Any]
) -> Sequence[Conditioner]:
    """Conditioners of images."""
    found: list[Conditioner] = []
    if dit.concat_channels:
        found.append(ConcatFrames())
    elif index.get("expand_timesteps"):
        # A known first frame needs a timestep per token; of Wan's models only 2.2 TI2V was trained with one.
        found.append(FirstFrame())
    return found if encoder is None else [*found, ClipImages(encoder=encoder)]
