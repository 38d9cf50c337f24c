"""The training loop: restore, step, save, evaluate, log; at the end the task's `finish`."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from vidgen.ckpt.manager import CheckpointManager
from vidgen.core.typing import Metrics
from vidgen.parallel import processes
from vidgen.train.evaluator import Evaluator
from vidgen.train.interrupt import Stopped, StopSignal
from vidgen.train.metrics_buffer import MetricsBuffer
from vidgen.train.optimizer import RunOptimizer
from vidgen.train.options import RunOptions
from vidgen.train.progress import Progress
from vidgen.train.report import Report
from vidgen.train.state import TrainState
from vidgen.train.task import Task
from vidgen.train.trainer import Trainer

__all__ = ["Batches", "fit"]


@runtime_checkable
class Batches(Protocol):
    """An endless sequence of host batches with a position that can be saved and restored."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Any, /) -> None: ...


def fit(
    *,
    task: Task,
    loader: Batches,
    options: RunOptions,
    optimizer: RunOptimizer,
    workdir: pathlib.Path | str,
    mesh: Mesh,
    evaluators: Sequence[Evaluator] = (),
    open_clips: Callable[[], Any] | None = None,
    resume_with: str = "the same command",
) -> TrainState:
    """Trains to `options.num_steps`, from the newest checkpoint in `workdir` if there is one.

    A stopped, killed or preempted run resumes bit-exactly: same parameters, moments, averages, noise and
    clips, and the same lines of metrics. On SIGTERM or SIGINT it finishes the step, saves and returns. An
    evaluation or `Task.finish` that was interrupted is done on resume.

    Args:
      loader: batches of this process, with `name` (for reports); the frame rate is computed from `video`, or
        from `num_frames`, the frames of the whole step.
      evaluators: called with the averaged weights at their intervals and at the end.
      open_clips: opens the training clips from the first one, for `Task.finish`.
      resume_with: the command that resumes the run, for the message after an interruption.

    Returns:
      The state after the last step.

    Raises:
      NonFiniteLoss: in too many steps in a row, or in the last step; checkpoints are unchanged.
      CheckpointError: the newest checkpoint, or that of `options.init_from`, is of another model.
      Stopped: a signal was received before the first step.
    """
    workdir, num_steps = pathlib.Path(workdir), options.num_steps
    stop = StopSignal(f"stopped before the first step, nothing is lost; start again with: {resume_with}")
    # `stop` encloses the checkpoints: a signal during the last save does not end the process.
    with jax.set_mesh(mesh), stop, _checkpoints(workdir, options) as checkpoints:
        with stop.at_once(end_process=True):
            trainer = Trainer(task, optimizer, options, mesh, checkpoints)
        if stop.requested():
            raise Stopped(stop.message)
        step = start = trainer.start
        recent = MetricsBuffer(workdir, options.stop_after_nonfinite, start, trainer.saved.get("recent"))
        report = Report(workdir, evaluators, trainer.models, start=start, num_steps=num_steps, stop=stop)
        with report, Progress(start=start, total=num_steps, enabled=processes.is_main_process()) as progress:
            stopped = not report.make_up(trainer.saved.get("line", {}))
            # `steps` is first in `zip`: no batch is taken beyond the last step.
            steps = range(start + 1, 1 if stopped else num_steps + 1)
            for step, batch in zip(steps, _at_saved_position(loader, trainer.saved), strict=False):
                # The first step includes compilation.
                with stop.at_once(end_process=True) if step == steps.start else contextlib.nullcontext():
                    metrics = trainer.step(step, batch)
                recent.add(step, batch, metrics)
                progress.advance(_num_frames(batch))
                stopped, last = stop.requested(), step == num_steps
                line: Metrics = {}
                if last or step % options.log_every == 0:
                    line = recent.means() | progress.rates()
                    if "loss" in line:  # absent if all steps were skipped
                        progress.show(line)
                if options.power_law and options.power_law.due(step, num_steps):
                    recent.check(last=last)
                    trainer.save_snapshot(step, workdir)
                if stopped or last or checkpoints.should_save(step) or report.evaluates(step):
                    recent.check(last=last)
                    extra = {"loader": loader.get_state(), "recent": recent.state(), "line": line}
                    trainer.save(step, extra)
                stopped = not report.after(step, line, finite=recent.finite, stopped=stopped)
                if stopped:
                    break
        stopped = stopped or not stop.completes(
            lambda: task.finish(
                trainer.models()[0], step=step, workdir=workdir, open_clips=open_clips, mesh=mesh
            )
        )
    if stopped and processes.is_main_process():
        print(f"stopped after step {step} of {num_steps}; resume with: {resume_with}", flush=True)
    return trainer.state


def _checkpoints(workdir: pathlib.Path, options: RunOptions) -> CheckpointManager:
    return CheckpointManager(
        workdir / "checkpoints",
        every=options.checkpoint_every,
        keep=options.keep,
        keep_every=options.keep_every,
        cleanup=True,
    )


def _at_saved_position(loader: Batches, saved: Mapping[str, Any]) -> Batches:
    """The loader, at its saved position."""
    if "loader" in saved:
        loader.set_state(saved["loader"])
    return loader


def _num_frames(batch: Mapping[str, Any]) -> int:
    """Frames of a batch over all processes."""
    if "num_frames" in batch:
        return batch["num_frames"]
    shape = batch["video"].shape
    return shape[0] * shape[1] * jax.process_count()
