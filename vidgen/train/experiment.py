"""An experiment: everything that a training run is made of, as values, and the folder that it owns."""

import dataclasses
import json
import pathlib
from typing import Any

from jax.sharding import Mesh

from vidgen.ckpt.json_files import write_json
from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.core.paths import hub_remedy
from vidgen.data.buckets import training_sizes
from vidgen.data.folder import FolderData
from vidgen.data.latents_data import LatentsData
from vidgen.data.sprites.source import SpritesData
from vidgen.data.tfds_clips import ArrayRecordData
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.processes import check_rows, check_tokens
from vidgen.train.optimizer import AdamW, Muon
from vidgen.train.options import RunOptions
from vidgen.train.packed_data import check_latents
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_task import VAETask

__all__ = ["Experiment", "check_sizes", "claim_workdir", "load_experiment"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is trained, on what, how, for how long and over which devices."""

    task: VAETask | TextToVideoTask
    data: SpritesData | FolderData | ArrayRecordData | LatentsData
    optimizer: AdamW | Muon = AdamW()
    run: RunOptions = RunOptions()
    mesh: MeshOptions = MeshOptions()


_MAY_CHANGE = (
    "mesh.",
    "task.dit.sequence.",
    "run.num_steps",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep",
    "run.num_threads",
)
"""Beginnings of the keys that may differ when a run is resumed: they do not change what a step computes."""


def check_sizes(experiment: Experiment, task: VAETask | TextToVideoTask, mesh: Mesh) -> None:
    """Sees to it that the model and the mesh take batches of every size of the data, before one is read.

    Args:
      task: the experiment's, which may read its VAE from elsewhere.

    Raises:
      ConfigError: a size does not fit; the message names it, and the nearest that do.
    """
    data, run = experiment.data, experiment.run
    if isinstance(data, LatentsData):
        check_latents(data, task, run.batch_size, mesh)
        return
    sizes = training_sizes(data, run.batch_size)
    places = [f"config.data.buckets[{number}]" for number in range(len(data.buckets))] or ["config.data"]
    for where, size in zip(places, sizes, strict=True):
        try:
            task.check_size(size.num_frames, size.height, size.width)
            check_rows(size.batch_size or run.batch_size, mesh)
            if isinstance(task, TextToVideoTask):
                check_tokens(task.num_tokens(size.num_frames, size.height, size.width), mesh)
        except ValueError as error:
            raise ConfigError(f"{where} ({size}): {error}") from error
        if size.batch_size and size.batch_size % run.grad_accumulation:
            raise ConfigError(
                f"{where} ({size}): batch_size is {size.batch_size}, which run.grad_accumulation "
                f"{run.grad_accumulation} does not divide"
            )
    if data.buckets:
        try:
            task.check_size(data.num_frames, data.height, data.width)
        except ValueError as error:
            raise ConfigError(f"config.data, whose own size is that of previews: {error}") from error


def load_experiment(workdir: pathlib.Path | str) -> Experiment:
    """The experiment that a training run's folder was made by.

    Raises:
      FileNotFoundError: `workdir` has no config.json.
      ConfigError: config.json is not one of this version of the code.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: {workdir} is not the workdir of a training run{hub_remedy(workdir)}"
        )
    return resolve(Experiment, _read(path), where=str(path))


def claim_workdir(experiment: Experiment, workdir: pathlib.Path | str, *, write: bool = True) -> None:
    """Makes `workdir` the folder of this experiment: checks the config.json that is there, or writes one.

    A run may be resumed with another mesh, number of steps, intervals and threads. Options that are newer
    than the run count as having had their default values.

    Args:
      write: False on the processes that only check.

    Raises:
      ConfigError: the folder belongs to another experiment; the keys that differ are named.
    """
    path = pathlib.Path(workdir) / "config.json"
    new = to_dict(experiment)
    if path.exists():
        # Options that are newer than the run have their defaults there.
        old = to_dict(load_experiment(workdir))
        differing = [key for key in _differences(old, new) if not key.startswith(_MAY_CHANGE)]
        if differing:
            raise ConfigError(
                f"{workdir} belongs to a run with another config; these keys differ (there -> now): "
                f"{_shown(differing, old, new)}. Use another --workdir, or the config of that run."
            )
    if write:
        write_json(path, new)


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore it, or use another workdir") from error


def _differences(old: Any, new: Any) -> list[str]:
    """The dotted keys whose values differ."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        key for key in sorted(flat_old.keys() | flat_new.keys()) if flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _shown(keys: list[str], old: Any, new: Any) -> str:
    flat_old, flat_new = _flatten(old), _flatten(new)
    return ", ".join(
        f"{key} {flat_old.get(key, '(absent)')!r} -> {flat_new.get(key, '(absent)')!r}" for key in keys
    )
