"""Loads the T5 encoder from a transformers folder: config.json and safetensors."""

import dataclasses
import pathlib
from typing import Literal

from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.config_values import ConfigValues, check_size
from vidgen.ckpt.pretrained import check_module, load_module
from vidgen.ckpt.weights import tensor_shapes
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.params import transformers_names

__all__ = ["BF16_PATTERN", "check_folder", "load_transformers", "read_config"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_IGNORED = r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\..*"
"""The duplicate name of the embeddings, and the decoder of encoder-decoder models."""

BF16_PATTERN = r".*\.kernel|embedding"
"""Pattern of the arrays that are stored in bfloat16 when matrix products are computed in bfloat16."""

_TYPES = {"t5": True, "umt5": False}
"""Supported values of `model_type`, and whether the layers share position biases."""


def read_config(folder: pathlib.Path | str) -> T5Config:
    """Config of the encoder in `folder`.

    Raises:
      FileNotFoundError: config.json is missing.
      UserError: config.json is of another model, or has unsupported options.
    """
    path = pathlib.Path(folder) / _CONFIG
    values = read_json(path, remedy="give the folder of a T5 or UMT5 encoder of transformers")
    return _config(ConfigValues(values, str(path)))


def load_transformers(
    folder: pathlib.Path | str, mesh: Mesh | None = None, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> T5Encoder:
    """Loads an encoder that `T5EncoderModel` or `UMT5EncoderModel` saved, in one file or several.

    Args:
      mesh: mesh to shard the weights over; None is one device.
      dtype: dtype of matrix products; with bfloat16 the matrices are also stored in bfloat16.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or has unsupported options.
      WeightsError: tensors are missing, unexpected or of another shape; names each.
    """
    config = _checked_config(folder, dtype)
    return load_module(
        pathlib.Path(folder) / _WEIGHTS,
        lambda: T5Encoder(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=transformers_names,
        bf16_pattern=None if dtype == "float32" else BF16_PATTERN,
        ignore=_IGNORED,
    )


def check_folder(folder: pathlib.Path | str) -> None:
    """Checks that `load_transformers` would succeed; reads only config.json and headers.

    Raises:
      FileNotFoundError, UserError, WeightsError: as `load_transformers`.
    """
    config = _checked_config(folder, "float32")
    path = pathlib.Path(folder) / _WEIGHTS
    make = lambda: T5Encoder(config, rngs=nnx.Rngs(0))  # noqa: E731
    check_module(path, make, names=transformers_names, ignore=_IGNORED)


def _config(config: ConfigValues) -> T5Config:
    kind = str(config.values.get("model_type"))[:80]
    if kind not in _TYPES:
        raise UserError(f"{config.where} is of model_type={kind!r}; expected one of {sorted(_TYPES)}")
    # T5 v1.1 and UMT5; T5 v1.0 has no gate.
    config.choice("feed_forward_proj", ("gated-gelu",))
    return config.make(
        T5Config,
        vocab_size=config.number("vocab_size", limits.VOCABULARY),
        dim=config.number("d_model", limits.WIDTH),
        num_layers=config.number("num_layers", limits.LAYERS),
        num_heads=config.number("num_heads", limits.HEADS),
        head_dim=config.number("d_kv", limits.WIDTH),
        ffn_dim=config.number("d_ff", limits.WIDTH),
        num_buckets=config.number("relative_attention_num_buckets", limits.BUCKETS, default=32),
        max_distance=config.number("relative_attention_max_distance", limits.TOKENS, default=128),
        shared_bias=_TYPES[kind],
        eps=float(config.number("layer_norm_epsilon", limits.EPSILON)),
    )


def _checked_config(folder: pathlib.Path | str, dtype: Literal["float32", "bfloat16"]) -> T5Config:
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    _check_size(config, pathlib.Path(folder))
    return config


def _check_size(config: T5Config, folder: pathlib.Path) -> None:
    """Checks that the weights are large enough for the matrices and embeddings of `config`."""
    inner = config.num_heads * config.head_dim
    needed = config.dim * (config.vocab_size + config.num_layers * (4 * inner + 3 * config.ffn_dim))
    path = folder / _WEIGHTS
    check_size(needed, tensor_shapes(path), config=str(folder / _CONFIG), weights=str(path))
