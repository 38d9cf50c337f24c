"""Models out of training runs: the averaged weights of the newest checkpoint."""

import pathlib

import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.train.experiment import Experiment, load_experiment
from vidgen.train.state import abstract_state, restore_averaged

__all__ = ["load_trained"]


def load_trained(
    workdir: pathlib.Path | str, mesh: Mesh, *, step: int | None = None
) -> tuple[Experiment, int, nnx.Module]:
    """The experiment of a run, and its module with averaged weights, laid over `mesh`.

    Args:
      step: which checkpoint; None is the newest.

    Returns:
      The experiment, the step of the checkpoint, the module (`Task.product`).

    Raises:
      FileNotFoundError: `workdir` is not that of a training run.
      CheckpointError: it has no such checkpoint.
    """
    experiment = load_experiment(workdir)
    # What the optimizer keeps is not read.
    abstract, graphdef = abstract_state(experiment.task, optax.identity(), mesh)
    step, *state = restore_averaged(workdir, abstract, step)
    return experiment, step, experiment.task.product(nnx.merge(graphdef, *state))
