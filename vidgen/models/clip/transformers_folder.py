"""CLIP's image encoder as transformers keeps it: a folder of config.json and safetensors."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.weights import tensor_shapes
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.clip.config import CLIPVisionConfig
from vidgen.models.clip.model import CLIPVision
from vidgen.models.clip.params import transformers_names

__all__ = ["load_transformers", "read_config"]


def read_config(folder: pathlib.Path | str) -> CLIPVisionConfig:
    """The shape of the encoder in `folder`.

    Raises:
      FileNotFoundError: there is no config.json.
      UserError: it is of another model, or asks for what this one does not have.
    """
    path = pathlib.Path(folder) / "config.json"
    return _config(
        read_json(path, remedy="give the folder of a CLIP image encoder of transformers"), str(path)
    )


def load_transformers(
    folder: pathlib.Path | str, mesh: Mesh | None = None, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> CLIPVision:
    """The encoder that `CLIPVisionModel` or `CLIPVisionModelWithProjection` saved.

    Args:
      mesh: over which the weights are laid; None is one device.
      dtype: of matrix products; with bfloat16 the matrices are kept in it too.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or asks for what this one does not have.
      WeightsError: names every tensor that is missing, left over or of another shape.
    """
    path = pathlib.Path(folder) / "model.safetensors"
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    old = any(name.startswith("vision_model.") for name in tensor_shapes(path))
    return load_module(
        path,
        lambda: CLIPVision(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=functools.partial(transformers_names, config, prefix="vision_model." if old else ""),
        halved=None if dtype == "float32" else r".*\.kernel",
        # Numbers from 0 on that old versions wrote, and what compares images with texts.
        ignore=r".*embeddings\.position_ids|(vision_model\.)?visual_projection\.weight",
    )


def _config(values: Mapping[str, Any], where: str) -> CLIPVisionConfig:
    if values.get("model_type") != "clip_vision_model":
        raise UserError(
            f"{where} is of model_type={values.get('model_type')!r}; expected 'clip_vision_model'"
        )
    if values["hidden_act"] not in ("gelu", "quick_gelu"):
        raise UserError(
            f"{where}: hidden_act={values['hidden_act']!r} is not supported; expected 'gelu' or 'quick_gelu'"
        )
    return CLIPVisionConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        ffn_dim=values["intermediate_size"],
        activation=values["hidden_act"],
        eps=values["layer_norm_eps"],
    )
