"""Loads and saves the transformer as a diffusers folder: config.json and safetensors."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.config_values import ConfigValues, check_size
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.weights import load_weights, save_weights, tensor_shapes
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import MATRICES, diffusers_names

__all__ = ["is_transformer", "load_arrays", "load_diffusers", "read_config", "save_diffusers"]

_CLASS, _CONFIG, _WEIGHTS = "WanTransformer3DModel", "config.json", "diffusion_pytorch_model.safetensors"


_REMEDY = "give the folder `transformer` of a diffusers checkpoint of Wan"

_IGNORED = r".*\.norm_added_q\.weight"
"""Query norms of the added projections: some image-to-video checkpoints have them, no model uses them."""


def read_config(folder: pathlib.Path | str) -> DiTConfig:
    """Config of the transformer in `folder`.

    Raises:
      FileNotFoundError: config.json is missing.
      UserError: config.json is of another model, or has unsupported options.
    """
    path = pathlib.Path(folder) / _CONFIG
    values = read_json(path, remedy=_REMEDY)
    return _config(ConfigValues(values, str(path)))


def load_diffusers(
    folder: pathlib.Path | str,
    mesh: Mesh | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    keep_dtypes: bool = False,
) -> DiT:
    """Loads a transformer that `WanTransformer3DModel.save_pretrained` wrote, in one file or several.

    Args:
      mesh: mesh to shard the weights over; None is one device.
      dtype: dtype of matrix products; with bfloat16 the matrices are also stored in bfloat16, which is for
        inference only.
      keep_dtypes: load arrays with the dtypes of the files.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or has unsupported options.
      WeightsError: tensors are missing, unexpected or of another shape; names each.
    """
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    _check_size(config, pathlib.Path(folder))
    return load_module(
        pathlib.Path(folder) / _WEIGHTS,
        lambda: DiT(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=functools.partial(diffusers_names, config),
        bf16_pattern=None if dtype == "float32" else MATRICES,
        keep_dtypes=keep_dtypes,
        ignore=_IGNORED,
    )


def is_transformer(folder: pathlib.Path | str) -> bool:
    """Whether `folder` holds a Wan transformer."""
    path = pathlib.Path(folder) / _CONFIG
    return path.exists() and read_json(path, remedy=_REMEDY).get("_class_name") == _CLASS


def load_arrays(
    folder: pathlib.Path | str, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Arrays of the transformer in `folder`, by vidgen's names, with the shardings and dtypes of `abstract`.

    Raises:
      UserError, WeightsError: as `load_diffusers`, or the tensors do not fit `abstract`.
    """
    names = diffusers_names(read_config(folder), abstract)
    path = pathlib.Path(folder) / _WEIGHTS
    return load_weights(
        path,
        dict(abstract),
        names=names,
        ignore=_IGNORED,
        remedy="set task.dit to the shape of these weights",
    )


def save_diffusers(dit: DiT, folder: pathlib.Path | str) -> None:
    """Writes a folder for `WanTransformer3DModel.from_pretrained`; each file is written atomically.

    Only process 0 writes, but all processes must call this.

    Raises:
      UserError: diffusers does not support an option of the transformer.
    """
    folder = pathlib.Path(folder)
    values = _values(dit.config)
    params = nnx.state(dit, nnx.Param, graph=False)
    names = diffusers_names(dit.config, named_leaves(params))
    save_weights(folder / _WEIGHTS, params, names=names, metadata={"format": "pt"})
    write_json(folder / _CONFIG, values)


def _config(config: ConfigValues) -> DiTConfig:
    values, where = config.values, config.where
    if values.get("_class_name") != _CLASS:
        raise UserError(f"{where} is of {str(values.get('_class_name'))[:80]!r}; expected {_CLASS!r}")
    config.choice("cross_attn_norm", (True,), default=True)
    config.choice("qk_norm", ("rms_norm_across_heads",), default="rms_norm_across_heads")
    num_heads = config.number("num_attention_heads", limits.HEADS)
    model_dim = num_heads * config.number("attention_head_dim", limits.WIDTH)
    image_dim = config.number("image_dim", limits.WIDTH, default=None)
    added = config.number("added_kv_proj_dim", limits.WIDTH, default=None)
    if (image_dim is None) != (added is None) or added not in (None, model_dim):
        raise UserError(
            f"{where}: image_dim={image_dim} with added_kv_proj_dim={added} is not supported; "
            f"expected neither of them, or added_kv_proj_dim={model_dim}"
        )
    in_channels, out_channels = (config.number(f"{side}_channels", limits.WIDTH) for side in ("in", "out"))
    return config.make(
        DiTConfig,
        in_channels=in_channels,
        out_channels=out_channels if out_channels != in_channels else None,
        patch_size=config.numbers("patch_size", limits.PATCH, (3,)),
        model_dim=model_dim,
        num_layers=config.number("num_layers", limits.LAYERS),
        num_heads=num_heads,
        ffn_dim=config.number("ffn_dim", limits.WIDTH),
        text_dim=config.number("text_dim", limits.WIDTH),
        image_dim=image_dim,
        image_positions=config.number("pos_embed_seq_len", limits.POSITIONS, default=0),
        freq_dim=config.number("freq_dim", limits.WIDTH),
        eps=float(config.number("eps", limits.EPSILON)),
    )


def _check_size(config: DiTConfig, folder: pathlib.Path) -> None:
    """Checks that the weights are large enough for the matrices of `config`."""
    width = config.model_dim
    needed = config.num_layers * width * (8 * width + 2 * config.ffn_dim) + width * (
        config.text_dim + config.freq_dim + 7 * width
    )
    path = folder / _WEIGHTS
    check_size(needed, tensor_shapes(path), config=str(folder / _CONFIG), weights=str(path))


def _values(config: DiTConfig) -> dict[str, Any]:
    if config.ffn != "gelu" or config.rope_theta != 10_000.0:
        raise UserError(
            f"ffn={config.ffn!r}, rope_theta={config.rope_theta}: diffusers' {_CLASS} supports only "
            "ffn='gelu' and rope_theta=10000"
        )
    return {
        "_class_name": _CLASS,
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.velocity_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.model_dim,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions or None,
    }
