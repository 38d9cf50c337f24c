"""The training loop, written once: restore, step, log, evaluate, save."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.manager import CheckpointManager
from vidgen.core.logging import get_logger
from vidgen.core.tree import count
from vidgen.core.typing import Metrics
from vidgen.parallel import processes
from vidgen.train.evaluator import Evaluator
from vidgen.train.interrupt import StopSignal
from vidgen.train.metrics import MetricsWriter
from vidgen.train.optimizer import AdamW, Muon, partitioned
from vidgen.train.options import RunOptions
from vidgen.train.power_law import averaging
from vidgen.train.progress import Progress
from vidgen.train.recent import RecentSteps
from vidgen.train.snapshots import save_snapshots
from vidgen.train.start import start_from
from vidgen.train.state import (
    TrainState,
    abstract_state,
    ema_model,
    init_state,
    place_frozen,
)
from vidgen.train.step import StepOptions, make_train_step
from vidgen.train.task import Task

__all__ = ["Batches", "fit", "step_options"]

_log = get_logger(__name__)
_DATA = "data"


@runtime_checkable
class Batches(Protocol):
    """An endless sequence of host batches that can say where it stands, and go there."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Any, /) -> None: ...


def fit(
    *,
    task: Task,
    loader: Batches,
    options: RunOptions,
    optimizer: AdamW | Muon,
    workdir: pathlib.Path | str,
    mesh: Mesh,
    evaluators: Sequence[Evaluator] = (),
    resume_with: str = "the same command",
) -> TrainState:
    """Trains to `options.num_steps`, from the newest checkpoint in `workdir` if there is one.

    A run that was stopped, killed or preempted goes on bit-exactly: same parameters, moments, averages, noise
    and clips. SIGTERM and SIGINT finish the step, save, and return.

    Args:
      loader: batches with `name` (for reports), for this process; for the rate of frames they have `video`,
        or `num_frames`, those of the whole step.
      evaluators: called with the averaged weights at their own intervals and at the end.
      resume_with: the command that goes on, for the message when the run is interrupted.

    Returns:
      The state after the last step.

    Raises:
      NonFiniteLoss: the clips of the step are in `workdir`/nonfinite_<step>.json; checkpoints stay as they
        were.
      CheckpointError: the newest checkpoint, or that of `options.init_from`, is of another model.
    """
    workdir = pathlib.Path(workdir)
    main = processes.is_main_process()
    tx = averaging(partitioned(optimizer, task.apart, options.num_steps), options.power_law)
    schedule = optimizer.schedule(options.num_steps)
    with jax.set_mesh(mesh), _checkpoints(workdir, options) as checkpoints, StopSignal() as stop:
        state, graphdef, start = _restore_or_init(task, tx, options, loader, mesh, checkpoints)
        frozen_graphdef, frozen = place_frozen(task.frozen(), mesh) or (None, None)
        train_step = make_train_step(task, graphdef, frozen_graphdef, tx, step_options(options), schedule)
        recent = RecentSteps(workdir)
        writer = MetricsWriter(workdir, resume_step=start, enabled=main)
        progress = Progress(start=start, total=options.num_steps, enabled=main)
        step = start
        with writer, progress:
            # The range goes first: no batch is taken beyond the last step.
            for step, batch in zip(range(start + 1, options.num_steps + 1), loader, strict=False):
                state, metrics = train_step(state, frozen, processes.global_batch(task.arrays(batch), mesh))
                recent.add(step, batch, metrics)
                progress.advance(_num_frames(batch))
                interrupted = processes.stop_requested_anywhere(step, stop.received)
                ending = interrupted or step == options.num_steps
                line: Metrics = {}
                if ending or step % options.log_every == 0:
                    line |= recent.means() | progress.rates()
                    progress.show(line)
                if not interrupted:
                    due = [
                        e
                        for e in evaluators
                        if step == options.num_steps or (e.every and step % e.every == 0)
                    ]
                    line |= _evaluate(due, task, state, graphdef, frozen_graphdef, frozen, step, workdir)
                writer.write(step, line)
                if ending or checkpoints.should_save(step):
                    recent.check()
                    checkpoints.save(step, state, {_DATA: loader.get_state()})
                if options.power_law and options.power_law.due(step, options.num_steps):
                    recent.check()
                    save_snapshots(workdir, step, state.opt_state, options.power_law)
                if interrupted:
                    break
    if step < options.num_steps and main:
        print(f"stopped after step {step} of {options.num_steps}; resume with: {resume_with}", flush=True)
    return state


def _checkpoints(workdir: pathlib.Path, options: RunOptions) -> CheckpointManager:
    return CheckpointManager(
        workdir / "checkpoints",
        every=options.checkpoint_every,
        keep=options.keep,
        keep_every=options.keep_every,
        cleanup=True,
    )


def _restore_or_init(
    task: Task,
    tx: optax.GradientTransformation,
    options: RunOptions,
    loader: Batches,
    mesh: Mesh,
    checkpoints: CheckpointManager,
) -> tuple[TrainState, nnx.GraphDef, int]:
    """The state to go on from, the module's graph, and the steps done; the loader is set to that place."""
    if checkpoints.latest_step() is None:
        state, graphdef = init_state(task, tx, jax.random.key(options.seed), mesh)
        _log.info("new run: %s parameters, mesh %s", f"{count(state.params):,}", dict(mesh.shape))
        if options.init_from is not None:
            state = start_from(options.init_from, state, task.apart)
        return state, graphdef, 0
    abstract, graphdef = abstract_state(task, tx, mesh)
    step, state, parts = checkpoints.restore(abstract, parts=(_DATA,))
    loader.set_state(parts[_DATA])
    _log.info("resuming after step %d of %d, from %s", step, options.num_steps, checkpoints.directory)
    return state, graphdef, step


def step_options(options: RunOptions) -> StepOptions:
    """The options of a run that a step has."""
    return StepOptions(
        grad_accumulation=options.grad_accumulation,
        grad_clip=options.grad_clip,
        ema_decay=options.ema_decay,
    )


def _evaluate(
    due: Sequence[Evaluator],
    task: Task,
    state: TrainState,
    graphdef: nnx.GraphDef,
    frozen_graphdef: nnx.GraphDef | None,
    frozen: nnx.State | None,
    step: int,
    workdir: pathlib.Path,
) -> Metrics:
    """The scores of the evaluators that are due, each under its name."""
    if not due:
        return {}
    model = task.product(ema_model(state, graphdef))
    frozen_model = None if frozen_graphdef is None else nnx.merge(frozen_graphdef, frozen)
    return {
        f"{evaluator.name}/{name}": value
        for evaluator in due
        for name, value in evaluator(model, frozen_model, step=step, workdir=workdir).items()
    }


def _num_frames(batch: Mapping[str, Any]) -> int:
    """Frames of a batch over all processes."""
    if "num_frames" in batch:
        return batch["num_frames"]
    shape = batch["video"].shape
    return shape[0] * shape[1] * jax.process_count()
