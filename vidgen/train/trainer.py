"""The state of a run and its compiled training step."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.manager import CheckpointManager
from vidgen.core.logging import get_logger
from vidgen.core.tree import count
from vidgen.core.typing import Metrics
from vidgen.nn.variables import Buffer, Constant
from vidgen.parallel import processes
from vidgen.train.base import load_base, save_base
from vidgen.train.init_from import init_from_run
from vidgen.train.optimizer import RunOptimizer
from vidgen.train.options import RunOptions
from vidgen.train.phases import due, named_groups, transformation
from vidgen.train.power_law import averaging
from vidgen.train.snapshots import save_snapshots
from vidgen.train.state import (
    FrozenState,
    TrainState,
    abstract_base,
    abstract_state,
    ema_model,
    init_state,
    place_frozen,
    with_stored_base,
)
from vidgen.train.step import StepOptions, make_train_step
from vidgen.train.task import Task

__all__ = ["Trainer", "step_options"]

_log = get_logger(__name__)
_PART = "data"


class Trainer:
    """A task's state, restored from the newest checkpoint or initialized, and its compiled step.

    Attributes:
      state: state after the newest step.
      start: steps done before.
      saved: JSON values saved with the state; empty in a new run.
    """

    def __init__(
        self,
        task: Task,
        optimizer: RunOptimizer,
        options: RunOptions,
        mesh: Mesh,
        checkpoints: CheckpointManager,
    ):
        """Restores or initializes the state.

        Raises:
          CheckpointError: the newest checkpoint, or that of `options.init_from`, is of another model.
        """
        length = options.schedule_length
        tx = averaging(transformation(task.phases, optimizer, length), options.power_law)
        self._task, self._options, self._mesh, self._checkpoints = task, options, mesh, checkpoints
        self.state: TrainState
        self.start = 0
        self.saved: dict[str, Any] = {}
        base = abstract_base(task, mesh)
        if checkpoints.latest_step() is None:
            self.state, self._graphdef = _new_state(task, tx, options, mesh)
        else:
            abstract, self._graphdef = abstract_state(task, tx, mesh)
            self.start, self.state, parts = _restored(checkpoints, abstract, base)
            # Older runs saved the loader's state alone.
            self.saved = parts[_PART] if "loader" in parts[_PART] else {"loader": parts[_PART]}
            _log.info(
                "resuming after step %d of %d, from %s", self.start, options.num_steps, checkpoints.directory
            )
        modules = {name: frozen.load() for name, frozen in task.frozen().items()}
        self._frozen_graphdefs, states = place_frozen(modules, mesh)
        base = load_base(checkpoints.directory.parent, task, options, base, claim=True)
        self._frozen = FrozenState(base=base, modules=states)
        self._step = make_train_step(
            task,
            self._graphdef,
            self._frozen_graphdefs,
            tx,
            step_options(options),
            optimizer.schedule(length),
        )

    def step(self, step: int, batch: Mapping[str, Any]) -> Metrics:
        """Trains on a batch; returns metrics on the device, or none if the step is skipped."""
        if self._options.skips(step):
            self.state = dataclasses.replace(self.state, step=self.state.step + 1)
            return {}
        arrays = processes.global_batch(self._task.arrays(batch), self._mesh)
        names = due(self._task.phases, step - 1)
        self.state, metrics = self._step(self.state, self._frozen, arrays, due=names)
        return metrics

    def models(self) -> tuple[nnx.Module, dict[str, nnx.Module]]:
        """Inference model with averaged weights, and the task's frozen modules."""
        model = ema_model(self.state, self._graphdef, self._frozen.base)
        return self._task.inference_model(model), self._frozen.merge(self._frozen_graphdefs)

    def save(self, step: int, beside: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint of the state and of the JSON values in `beside`."""
        self._checkpoints.save(step, self.state, {_PART: dict(beside)})

    def save_snapshot(self, step: int, workdir: pathlib.Path) -> None:
        """Writes a snapshot of the averages of `options.power_law`."""
        assert self._options.power_law is not None
        save_snapshots(workdir, step, self.state.opt_state, self._options.power_law)


def step_options(options: RunOptions) -> StepOptions:
    """Run options that apply to a step."""
    return StepOptions(
        grad_accumulation=options.grad_accumulation,
        grad_clip=options.grad_clip,
        ema_decay=options.ema_decay,
    )


def _restored(
    checkpoints: CheckpointManager, abstract: TrainState, base: nnx.State
) -> tuple[int, TrainState, dict[str, Any]]:
    """Step, state and JSON values of the newest checkpoint.

    A base among its buffers, where older versions saved it, moves to the workdir.
    """
    step, state, parts = checkpoints.restore(with_stored_base(checkpoints, abstract, base), parts=(_PART,))
    buffers, stored = nnx.split_state(state.buffers, Buffer, Constant)
    if jax.tree.leaves(stored):
        save_base(checkpoints.directory.parent, stored)
    return step, dataclasses.replace(state, buffers=buffers), parts


def _new_state(
    task: Task, tx: optax.GradientTransformation, options: RunOptions, mesh: Mesh
) -> tuple[TrainState, nnx.GraphDef]:
    state, graphdef = init_state(task, tx, jax.random.key(options.seed), mesh)
    _log.info("new run: %s parameters, mesh %s", f"{count(state.params):,}", dict(mesh.shape))
    if options.init_from is not None:
        state = init_from_run(options.init_from, state, named_groups(task.phases))
    return state, graphdef
