"""Loads CLIP's image encoder from a transformers folder: config.json and safetensors."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.config_values import ConfigValues, check_size
from vidgen.ckpt.pretrained import check_module, load_module
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.ckpt.weights import tensor_shapes
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.clip.config import CLIPVisionConfig
from vidgen.models.clip.model import CLIPVision
from vidgen.models.clip.params import transformers_names

__all__ = ["check_folder", "load_transformers", "read_config"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_IGNORED = r".*embeddings\.position_ids|(vision_model\.)?visual_projection\.weight"
"""Position ids, which old versions wrote, and the projection to the joint space of images and texts."""


def read_config(folder: pathlib.Path | str) -> CLIPVisionConfig:
    """Config of the encoder in `folder`.

    Raises:
      FileNotFoundError: config.json is missing.
      UserError: config.json is of another model, or has unsupported options.
    """
    path = pathlib.Path(folder) / _CONFIG
    values = read_json(path, remedy="give the folder of a CLIP image encoder of transformers")
    return _config(ConfigValues(values, str(path)))


def load_transformers(
    folder: pathlib.Path | str, mesh: Mesh | None = None, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> CLIPVision:
    """Loads an encoder that `CLIPVisionModel` or `CLIPVisionModelWithProjection` saved.

    Args:
      mesh: mesh to shard the weights over; None is one device.
      dtype: dtype of matrix products; with bfloat16 the matrices are also stored in bfloat16.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or has unsupported options.
      WeightsError: tensors are missing, unexpected or of another shape; names each.
    """
    path = pathlib.Path(folder) / _WEIGHTS
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    return load_module(
        path,
        lambda: CLIPVision(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=_names(config, pathlib.Path(folder)),
        bf16_pattern=None if dtype == "float32" else r".*\.kernel",
        ignore=_IGNORED,
    )


def check_folder(folder: pathlib.Path | str) -> None:
    """Checks that `load_transformers` would succeed; reads only config.json and headers.

    Raises:
      FileNotFoundError, UserError, WeightsError: as `load_transformers`.
    """
    config = read_config(folder)
    names = _names(config, pathlib.Path(folder))
    make = lambda: CLIPVision(config, rngs=nnx.Rngs(0))  # noqa: E731
    check_module(pathlib.Path(folder) / _WEIGHTS, make, names=names, ignore=_IGNORED)


def _names(
    config: CLIPVisionConfig, folder: pathlib.Path
) -> Callable[[Iterable[str]], Mapping[str, TensorMapping]]:
    """Name table of the transformers version that wrote the weights; also checks the weights' size."""
    shapes = tensor_shapes(folder / _WEIGHTS)
    _check_size(config, folder, shapes)
    old = any(name.startswith("vision_model.") for name in shapes)
    return functools.partial(transformers_names, config, prefix="vision_model." if old else "")


def _config(config: ConfigValues) -> CLIPVisionConfig:
    kind = str(config.values.get("model_type"))[:80]
    if kind != "clip_vision_model":
        raise UserError(f"{config.where} is of model_type={kind!r}; expected 'clip_vision_model'")
    return config.make(
        CLIPVisionConfig,
        image_size=config.number("image_size", limits.SIDE),
        patch_size=config.number("patch_size", limits.SIDE),
        dim=config.number("hidden_size", limits.WIDTH),
        num_layers=config.number("num_hidden_layers", limits.LAYERS),
        num_heads=config.number("num_attention_heads", limits.HEADS),
        ffn_dim=config.number("intermediate_size", limits.WIDTH),
        activation=config.choice("hidden_act", ("gelu", "quick_gelu")),
        eps=float(config.number("layer_norm_eps", limits.EPSILON)),
    )


def _check_size(config: CLIPVisionConfig, folder: pathlib.Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that the weights are large enough for the matrices and position embeddings of `config`."""
    layer = 4 * config.dim + 2 * config.ffn_dim
    needed = config.dim * (config.num_layers * layer + 3 * config.patch_size**2 + config.num_tokens)
    check_size(needed, shapes, config=str(folder / _CONFIG), weights=str(folder / _WEIGHTS))
