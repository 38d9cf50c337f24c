"""The T5 encoder as transformers keeps it: a folder of config.json and safetensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.weights import load_weights
from vidgen.core.tree import named_leaves
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.params import transformers_names
from vidgen.parallel.rules import shardings

__all__ = ["load_transformers", "read_config"]

_TYPES = {"t5": True, "umt5": False}
"""Kinds of models that are read, and whether their layers share biases."""


def read_config(folder: pathlib.Path | str) -> T5Config:
    """The shape of the encoder in `folder`.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is of another model, or asks for what this one does not have.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give the folder of a T5 or UMT5 encoder of transformers")
    return _config(json.loads(path.read_text()), str(path))


def load_transformers(folder: pathlib.Path | str, mesh: Mesh | None = None) -> T5Encoder:
    """The encoder that `T5EncoderModel` or `UMT5EncoderModel` saved, in one file or several.

    Args:
      mesh: over which the weights are laid; None is one device.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      ValueError: config.json is of another model, or asks for what this one does not have.
      WeightsError: names every tensor that is missing, left over or of another shape.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), graph=False)
    if mesh is not None:
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            params,
            shardings(params, mesh),
        )
    weights = load_weights(
        folder / "model.safetensors",
        params,
        names=transformers_names(named_leaves(params)),
        # The same table under its other name, and the decoder of whole models.
        ignore=r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\..*",
        remedy="use the weights that belong to this config.json",
    )
    return nnx.merge(graphdef, weights)


def _config(values: Mapping[str, Any], where: str) -> T5Config:
    kind = values.get("model_type")
    if kind not in _TYPES:
        raise ValueError(f"{where} is of model_type={kind!r}; expected one of {sorted(_TYPES)}")
    if values.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
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
