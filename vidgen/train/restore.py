"""Loads models from training runs: the averaged weights of a checkpoint."""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.nn.variables import Buffer, Constant, thaw
from vidgen.train.base import load_base
from vidgen.train.experiment import Experiment, load_experiment
from vidgen.train.state import abstract_base, abstract_state, merge_model, restore_averaged

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
    # Of training: what the run recorded about its base does not depend on `dtype`.
    abstract_constants = abstract_base(experiment.task, mesh)
    if dtype is not None:
        experiment = dataclasses.replace(experiment, task=experiment.task.with_dtype(dtype))
    task = experiment.task
    # The optimizer state is not read.
    abstract, graphdef = abstract_state(task, optax.identity(), mesh)
    step, params, buffers = restore_averaged(workdir, abstract, abstract_constants, step)
    buffers, base = nnx.split_state(buffers, Buffer, Constant)
    if not jax.tree.leaves(base):
        base = load_base(
            pathlib.Path(workdir), task, experiment.run, abstract_constants, dtype=jax.numpy.float32
        )
    model: Any = thaw(merge_model(graphdef, params, buffers, base))
    return experiment, step, task.inference_model(model)
