"""Models out of training runs: the averaged weights of the newest checkpoint."""

import dataclasses
import pathlib
from typing import Literal

import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.train.experiment import Experiment, load_experiment
from vidgen.train.state import abstract_state, restore_averaged
from vidgen.train.text_to_video_task import TextToVideoTask

__all__ = ["load_trained"]


def load_trained(
    workdir: pathlib.Path | str,
    mesh: Mesh,
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> tuple[Experiment, int, nnx.Module]:
    """The experiment of a run, and its module with averaged weights, laid over `mesh`.

    Args:
      step: which checkpoint; None is the newest.
      dtype: of the matrix products of a video model, in the place of that of training.

    Returns:
      The experiment, the step of the checkpoint, the module (`Task.product`).

    Raises:
      FileNotFoundError: `workdir` is not that of a training run.
      CheckpointError: it has no such checkpoint.
    """
    experiment = load_experiment(workdir)
    if dtype is not None and isinstance(experiment.task, TextToVideoTask):
        experiment = dataclasses.replace(experiment, task=experiment.task.with_dtype(dtype))
    # What the optimizer keeps is not read.
    abstract, graphdef = abstract_state(experiment.task, optax.identity(), mesh)
    step, *state = restore_averaged(workdir, abstract, step)
    return experiment, step, experiment.task.inference_model(nnx.merge(graphdef, *state))
