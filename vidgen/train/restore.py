"""Loads models from training runs: the averaged weights of a checkpoint."""

import dataclasses
import pathlib
from typing import Literal

import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.train.experiment import Experiment, load_experiment
from vidgen.train.state import abstract_state, restore_averaged
from vidgen.train.text_to_video_task import TextToVideoTask

__all__ = ["load_run"]


def load_run(
    workdir: pathlib.Path | str,
    mesh: Mesh,
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> tuple[Experiment, int, nnx.Module]:
    """Experiment of a run, checkpoint step, and module with averaged weights placed on `mesh`.

    Args:
      step: step of the checkpoint; None is the newest.
      dtype: dtype of a video model's matrix products; None is the dtype of training.

    Returns:
      The experiment, the step of the checkpoint, the module (`Task.inference_model`).

    Raises:
      FileNotFoundError: `workdir` is not that of a training run.
      CheckpointError: it has no such checkpoint.
    """
    experiment = load_experiment(workdir)
    if dtype is not None and isinstance(experiment.task, TextToVideoTask):
        experiment = dataclasses.replace(experiment, task=experiment.task.with_dtype(dtype))
    # The optimizer state is not read.
    abstract, graphdef = abstract_state(experiment.task, optax.identity(), mesh)
    step, *state = restore_averaged(workdir, abstract, step)
    return experiment, step, experiment.task.inference_model(nnx.merge(graphdef, *state))
