"""The T5 encoder as transformers keeps it: a folder of config.json and safetensors."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.pretrained import load_module
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.params import transformers_names

__all__ = ["load_transformers", "read_config"]

_TYPES = {"t5": True, "umt5": False}
"""Kinds of models that are read, and whether their layers share biases."""


def read_config(folder: pathlib.Path | str) -> T5Config:
    """The shape of the encoder in `folder`.

    Raises:
      FileNotFoundError: there is no config.json.
      UserError: it is of another model, or asks for what this one does not have.
    """
    path = pathlib.Path(folder) / "config.json"
    return _config(
        read_json(path, remedy="give the folder of a T5 or UMT5 encoder of transformers"), str(path)
    )


def load_transformers(
    folder: pathlib.Path | str, mesh: Mesh | None = None, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> T5Encoder:
    """The encoder that `T5EncoderModel` or `UMT5EncoderModel` saved, in one file or several.

    Args:
      mesh: over which the weights are laid; None is one device.
      dtype: of matrix products; with bfloat16 the matrices are kept in it too.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or asks for what this one does not have.
      WeightsError: names every tensor that is missing, left over or of another shape.
    """
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    return load_module(
        pathlib.Path(folder) / "model.safetensors",
        lambda: T5Encoder(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=transformers_names,
        halved=None if dtype == "float32" else r".*\.kernel|embedding",
        # The same table under its other name, and the decoder of whole models.
        ignore=r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\..*",
    )


def _config(values: Mapping[str, Any], where: str) -> T5Config:
    kind = values.get("model_type")
    if kind not in _TYPES:
        raise UserError(f"{where} is of model_type={kind!r}; expected one of {sorted(_TYPES)}")
    if values.get("feed_forward_proj") != "gated-gelu":
        raise UserError(
            f"{where}: feed_forward_proj={values.get('feed_forward_proj')!r} is not supported; "
            "expected 'gated-gelu' (T5 v1.1, UMT5)"
        )
    return T5Config(
        vocab_size=values["vocab_size"],
        dim=values["d_model"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        head_dim=values["d_kv"],
        ffn_dim=values["d_ff"],
        num_buckets=values.get("relative_attention_num_buckets", 32),
        max_distance=values.get("relative_attention_max_distance", 128),
        shared_bias=_TYPES[kind],
        eps=values["layer_norm_epsilon"],
    )
