"""An experiment: all options of a training run, and the workdir that belongs to it."""

import dataclasses
import pathlib
from typing import Any

from vidgen.ckpt.json_files import write_json
from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.core.files import read_json
from vidgen.core.logging import get_logger
from vidgen.core.paths import hub_remedy
from vidgen.core.user_classes import CLASS
from vidgen.data.folder import FolderData
from vidgen.data.latents_data import LatentsData
from vidgen.data.sprites.source import SpritesData
from vidgen.data.tfds_clips import ArrayRecordData
from vidgen.data.training_data import TrainingData
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import AdamW, Muon, RunOptimizer
from vidgen.train.options import RunOptions
from vidgen.train.resuming import check_changes
from vidgen.train.task import ExperimentTask
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_task import VAETask

__all__ = ["Experiment", "claim_workdir", "load_experiment"]

_log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Task, data, optimizer, run and mesh options of a training run.

    Task, data and optimizer may be instances of users' own classes, which fill the roles.
    """

    task: VAETask | TextToVideoTask | ExperimentTask
    data: SpritesData | FolderData | ArrayRecordData | LatentsData | TrainingData
    optimizer: AdamW | Muon | RunOptimizer = AdamW()
    run: RunOptions = RunOptions()
    mesh: MeshOptions = MeshOptions()


def load_experiment(workdir: pathlib.Path | str) -> Experiment:
    """Experiment stored in a training run's workdir.

    Raises:
      FileNotFoundError: `workdir` has no config.json.
      ConfigError: config.json does not fit this version of the code.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: {workdir} is not the workdir of a training run{hub_remedy(workdir)}"
        )
    values = read_json(path, remedy="restore it, or use another workdir")
    return resolve(Experiment, _upgraded(values), where=str(path))


def _upgraded(values: Any) -> Any:
    """Values of a config.json with the options of earlier versions replaced by today's."""
    task = values.get("task") if isinstance(values, dict) else None
    if not isinstance(task, dict) or task.get("kind") != "text_to_video" or CLASS in task:
        return values
    if task.get("images", "") not in (None, "beside", "first"):
        return values
    kept = {name: value for name, value in task.items() if name not in ("images", "image_share")}
    conditioners = {
        None: [],
        "beside": [{"kind": "concat_frames"}],
        "first": [{"kind": "first_frame", "probability": task.get("image_share", 1.0)}],
    }[task["images"]]
    return values | {"task": kept | {"conditioners": conditioners}}


def claim_workdir(experiment: Experiment, workdir: pathlib.Path | str, *, write: bool = True) -> Experiment:
    """Claims `workdir` for this experiment: checks an existing config.json, or writes one.

    A resumed run may change the options in `vidgen.train.resuming.MAY_CHANGE`; changes are logged. Options
    that are newer than the run count as having had their default values.

    Args:
      write: False on processes that only check.

    Returns:
      The experiment to run; `run.schedule_steps` and `run.init_from` of None are those of the run so far.

    Raises:
      ConfigError: the folder belongs to another experiment (the message names the keys that differ), or it
        has checkpoints but no config.json.
    """
    path = pathlib.Path(workdir) / "config.json"
    run = experiment.run
    if path.exists():
        old = load_experiment(workdir)
        old_run = dataclasses.replace(old.run, schedule_steps=old.run.schedule_length)
        if run.schedule_steps is None:
            run = dataclasses.replace(run, schedule_steps=old_run.schedule_steps)
        if run.init_from is None:
            run = dataclasses.replace(run, init_from=old_run.init_from)
        experiment = dataclasses.replace(experiment, run=run)
        check_changes(to_dict(dataclasses.replace(old, run=old_run)), to_dict(experiment), workdir)
    elif any((path.parent / "checkpoints").glob("[0-9]*")):
        raise ConfigError(
            f"{path} is missing, and {path.parent / 'checkpoints'} has checkpoints whose options are "
            "unknown: restore the file, use another --workdir, or remove the "
            "checkpoints"
        )
    elif run.schedule_steps is None:
        experiment = dataclasses.replace(
            experiment, run=dataclasses.replace(run, schedule_steps=run.num_steps)
        )
    if experiment.run.schedule_length != run.num_steps:
        _log.info(
            "the run stops after step %d; its learning rate rises and falls over %d (run.schedule_steps)",
            run.num_steps,
            experiment.run.schedule_length,
        )
    if write:
        write_json(path, to_dict(experiment))
    return experiment
