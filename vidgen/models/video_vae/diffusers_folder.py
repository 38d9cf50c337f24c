"""Loads and saves the autoencoder as a diffusers folder: config.json and safetensors."""

import pathlib
from typing import Any

import numpy as np
from flax import nnx

from vidgen.ckpt.config_values import ConfigValues, check_size
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.weights import load_weights, save_weights, tensor_shapes
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.core.logging import get_logger
from vidgen.core.tree import named_leaves
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE, first_statistics
from vidgen.models.video_vae.params import diffusers_names
from vidgen.nn.variables import Buffer

_log = get_logger(__name__)

__all__ = ["is_diffusers", "load_diffusers", "read_config", "save_diffusers"]

_CLASS, _CONFIG, _WEIGHTS = "AutoencoderKLWan", "config.json", "diffusion_pytorch_model.safetensors"

_REMEDY = "give the folder `vae` of a diffusers checkpoint of Wan"


def is_diffusers(folder: pathlib.Path | str) -> bool:
    """Whether `folder` holds a diffusers model of any class."""
    path = pathlib.Path(folder) / _CONFIG
    return path.exists() and "_class_name" in read_json(path, remedy=_REMEDY)


def read_config(folder: pathlib.Path | str) -> VAEConfig:
    """Config of the autoencoder in `folder`.

    Raises:
      FileNotFoundError: config.json is missing.
      UserError: config.json is of another model, or has unsupported options.
    """
    path = pathlib.Path(folder) / _CONFIG
    return _config(ConfigValues(read_json(path, remedy=_REMEDY), str(path)))


def load_diffusers(folder: pathlib.Path | str, *, keep_dtypes: bool = False) -> VideoVAE:
    """Loads an autoencoder that `AutoencoderKLWan.save_pretrained` wrote, such as Wan 2.1's or 2.2's.

    Args:
      keep_dtypes: load arrays with the dtypes of the file instead of float32.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      UserError: config.json is of another model, or has unsupported options.
      WeightsError: tensors are missing, unexpected or of another shape; names each.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    path = folder / _WEIGHTS
    check_size(config.least_size, tensor_shapes(path), config=str(folder / _CONFIG), weights=str(path))
    vae = nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    graphdef, params, buffers = nnx.split(vae, nnx.Param, ..., graph=False)
    names = diffusers_names(config, named_leaves(params))
    loaded = load_weights(path, params, names=names, keep_dtypes=keep_dtypes)
    vae = nnx.merge(graphdef, loaded, buffers)
    vae.latents_mean, vae.latents_variance, vae.latents_count = map(Buffer, first_statistics(config))
    return vae


def save_diffusers(vae: VideoVAE, folder: pathlib.Path | str) -> None:
    """Writes a folder for `AutoencoderKLWan.from_pretrained`; each file is written atomically.

    Warns if diffusers lacks the level shortcuts; `load_diffusers` reads them. Only process 0 writes, but all
    processes must call this.
    """
    folder = pathlib.Path(folder)
    if not _diffusers_has_shortcuts(vae.config):
        _log.warning(
            "%s: diffusers refuses this autoencoder; only this package can read it. With level_shortcuts, "
            "diffusers requires each level's channels times the pixels merged by its step to be a multiple "
            "of the next level's channels, and the last level to have no more channels than the one before: "
            "dim_mult is %s, Wan's is (1, 2, 4, 4)",
            folder,
            vae.config.dim_mult,
        )
    params = nnx.state(vae, nnx.Param, graph=False)
    names = diffusers_names(vae.config, named_leaves(params))
    save_weights(folder / _WEIGHTS, params, names=names, metadata={"format": "pt"})
    write_json(folder / _CONFIG, _values(vae))


def _diffusers_has_shortcuts(config: VAEConfig) -> bool:
    """Whether each shortcut averages or repeats equal groups of channels: diffusers supports no other."""
    if not config.level_shortcuts:
        return True
    mults = (1, *config.dim_mult)
    merged = [8 if temporal else 4 for temporal in config.temporal_downsample]
    down = zip(mults, mults[1:], [*merged, 1], strict=False)
    up = zip((mults[-1], *mults[:0:-1]), mults[:0:-1], merged[::-1], strict=False)
    return not any(dim_in * pixels % dim_out for dim_in, dim_out, pixels in down) and not any(
        dim_out * pixels % dim_in for dim_in, dim_out, pixels in up
    )


def _config(config: ConfigValues) -> VAEConfig:
    values, where = config.values, config.where
    if values.get("_class_name") != _CLASS:
        raise UserError(f"{where} is of {str(values.get('_class_name'))[:80]!r}; expected {_CLASS!r}")
    if values.get("attn_scales"):
        raise UserError(
            f"{where}: attn_scales={str(values['attn_scales'])[:80]} is not supported; expected []"
        )
    channels = config.number("z_dim", limits.WIDTH)
    dim_mult = config.numbers("dim_mult", limits.PATCH, range(1, limits.MAX_LEVELS + 1))
    return config.make(
        VAEConfig,
        base_dim=config.number("base_dim", limits.WIDTH),
        decoder_base_dim=config.number("decoder_base_dim", limits.WIDTH, default=None),
        latent_channels=channels,
        dim_mult=dim_mult,
        num_res_blocks=config.number("num_res_blocks", limits.RES_BLOCKS),
        temporal_downsample=config.flags("temperal_downsample", (len(dim_mult) - 1,)),
        patch_size=config.number("patch_size", limits.PATCH, default=1),
        level_shortcuts=config.flag("is_residual", False),
        latents_mean=tuple(map(float, config.numbers("latents_mean", limits.STATISTIC, (channels,)))),
        latents_std=tuple(map(float, config.numbers("latents_std", limits.POSITIVE, (channels,)))),
    )


def _values(vae: VideoVAE) -> dict[str, Any]:
    config = vae.config
    return {
        "_class_name": _CLASS,
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
        "latents_mean": np.asarray(vae.latents_mean[...]).tolist(),
        "latents_std": np.sqrt(np.asarray(vae.latents_variance[...])).tolist(),
        "is_residual": config.level_shortcuts,
        "in_channels": 3 * config.patch_size**2,
        "out_channels": 3 * config.patch_size**2,
        "patch_size": None if config.patch_size == 1 else config.patch_size,
        "scale_factor_temporal": config.temporal_factor,
        "scale_factor_spatial": config.spatial_factor,
    }
