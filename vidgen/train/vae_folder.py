"""A VAE as a folder of JSON and safetensors: in the run that trained it and in each run that uses it."""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.checked_weights import save_checked_weights, verify_weights
from vidgen.ckpt.config_values import check_size
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.weights import tensor_shapes
from vidgen.core.config import resolve, to_dict
from vidgen.core.files import read_json
from vidgen.core.paths import hub_remedy, packaged
from vidgen.core.tree import named_leaves
from vidgen.data.loader import Loader
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.diffusers_folder import is_diffusers, load_diffusers, read_config
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel import processes
from vidgen.train.latent_statistics import measure_latents, with_statistics

__all__ = ["encoder_fingerprint", "export_vae", "has_vae", "load_vae", "save_vae", "vae_config"]

_FOLDER, _CONFIG, _WEIGHTS = "vae", "config.json", "model.safetensors"
_RECORD = "exported.json"
"""Step after which the training run exported the VAE."""


def save_vae(vae: VideoVAE, workdir: pathlib.Path | str) -> None:
    """Writes `workdir`/vae, replacing an existing one; each file appears atomically.

    With several processes all of them must call this; process 0 writes.
    """
    folder = pathlib.Path(workdir) / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_checked_weights(folder / _WEIGHTS, nnx.state(vae, graph=False))
    write_json(folder / _CONFIG, to_dict(vae.config))


def has_vae(workdir: pathlib.Path | str) -> bool:
    """Whether `workdir`/vae is complete."""
    return (_folder(workdir) / _CONFIG).exists()


def load_vae(workdir: pathlib.Path | str) -> VideoVAE:
    """VAE in `workdir`/vae; `workdir` may be a Wan checkpoint in diffusers' layout, or its `vae`.

    Raises:
      FileNotFoundError: there is no VAE.
      WeightsError: its weights do not fit its config, or differ from what was written.
    """
    if is_diffusers(_folder(workdir)):
        return load_diffusers(_folder(workdir))
    config = vae_config(workdir)
    weights = _folder(workdir) / _WEIGHTS
    config_file = str(weights.with_name(_CONFIG))
    check_size(config.least_size, tensor_shapes(weights), config=config_file, weights=str(weights))
    vae = load_module(weights, lambda: VideoVAE(config, rngs=nnx.Rngs(0)), remedy="use the config of its run")
    remedy = "Bring it back from a copy, or from the run that trained it"
    verify_weights(weights, nnx.state(vae, graph=False), remedy=remedy)
    return vae


def vae_config(workdir: pathlib.Path | str) -> VAEConfig:
    """Config of the VAE in `workdir`/vae.

    Raises:
      FileNotFoundError: there is no VAE.
    """
    folder = _folder(workdir)
    if not has_vae(workdir):
        raise FileNotFoundError(
            f"{folder} holds no VAE; expected the workdir of a finished VAE run, or of a run that used one. "
            f"Train one with a config of experiments/vae, or correct task.vae{hub_remedy(workdir)}"
        )
    if is_diffusers(folder):
        return read_config(folder)
    values = read_json(folder / _CONFIG, remedy="train the VAE again, or take another copy of its workdir")
    return resolve(VAEConfig, values, where=str(folder / _CONFIG))


def encoder_fingerprint(vae: VideoVAE) -> str:
    """Digest of everything that a VAE's latents depend on: equal digests mean equal latents.

    The decoder is excluded: after further training it still decodes the existing latents.
    """
    arrays = named_leaves(nnx.state(vae, graph=False))
    parts = ("encoder.", "quant_conv.", "latents_mean", "latents_variance")
    digest = hashlib.sha256()
    for name in sorted(name for name in arrays if name.startswith(parts)):
        digest.update(name.encode())
        digest.update(np.asarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _folder(workdir: pathlib.Path | str) -> pathlib.Path:
    path = packaged(workdir)
    return path if is_diffusers(path) else path / _FOLDER


def export_vae(
    vae: VideoVAE,
    workdir: pathlib.Path | str,
    *,
    step: int,
    open_clips: Callable[[], Loader] | None = None,
    num_clips: int = 0,
    mesh: Mesh | None = None,
) -> None:
    """Exports a run's VAE for the runs that use it; an export of the same step stays as it is.

    Its latents are normalised by statistics of these weights over training clips, the same clips each time.
    All processes must call this.

    Args:
      step: step of the weights.
      open_clips: opens a `Loader` of training clips, from the first clip.
      num_clips: clips over which the statistics are measured, or all if there are fewer; 0 leaves the VAE's
        statistics unchanged.
      mesh: mesh over which batches are sharded.
    """
    record = pathlib.Path(workdir) / _FOLDER / _RECORD
    exported = read_json(record, remedy="remove it").get("step") if record.exists() else None
    processes.sync("record of the exported VAE")  # before any process writes it
    if exported == step and has_vae(workdir):
        return
    if num_clips:
        if open_clips is None:
            raise ValueError(f"num_clips is {num_clips}, which needs open_clips")
        with open_clips() as clips:
            count = min(num_clips, clips.num_clips)
            vae = with_statistics(vae, measure_latents(vae, clips, num_clips=count, mesh=mesh))
    save_vae(vae, workdir)
    write_json(record, {"step": step})
