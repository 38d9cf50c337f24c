"""Metrics lines of a run, with the scores of the evaluations that are due."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from vidgen.ckpt.json_files import write_json
from vidgen.core.files import read_json
from vidgen.core.logging import get_logger
from vidgen.core.typing import Metrics
from vidgen.parallel import processes
from vidgen.train.evaluator import Evaluator
from vidgen.train.interrupt import StopSignal
from vidgen.train.metrics import MetricsWriter

__all__ = ["Report"]

_log = get_logger(__name__)
_FILE = "evaluated.json"


class Report:
    """Runs the evaluators that are due after a step, then writes the step's metrics. A context manager.

    `workdir`/evaluated.json records the last step of each evaluator, so that a resumed run repeats an
    interrupted evaluation but not a completed one. It is written after the metrics line.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        evaluators: Sequence[Evaluator],
        models: Callable[[], tuple[nnx.Module, Mapping[str, nnx.Module]]],
        *,
        start: int,
        num_steps: int,
        stop: StopSignal,
    ):
        """Reads the record and opens the metrics files.

        Args:
          models: returns the model to evaluate, as of the newest step, and the frozen modules.
          start: steps done; evaluations due after it are still run unless they are in the record.
          num_steps: steps of the whole run.
          stop: interrupts an evaluation at once.
        """
        self._workdir, self._evaluators, self._models = workdir, evaluators, models
        self._start, self._num_steps, self._stop = start, num_steps, stop
        path = workdir / _FILE
        remedy = "remove it: then the evaluations of the newest checkpoint are repeated"
        self._done: dict[str, Any] = read_json(path, remedy=remedy) if path.exists() else {}
        due = self._due(start)
        self._complete = bool(due) and all(self._done.get(e.name, 0) >= start for e in due)
        processes.sync("record of evaluations")  # before any process writes it
        before = start if self._complete else start - 1
        self._writer = MetricsWriter(workdir, resume_step=before, enabled=processes.is_main_process())

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def evaluates(self, step: int) -> bool:
        """Whether an evaluator is due after `step`."""
        return bool(self._due(step))

    def make_up(self, line: Metrics) -> bool:
        """Calls `after` for the step that the run resumes from, if an interruption lost its line.

        Args:
          line: metrics of that step.

        Returns:
          Whether the run continues.
        """
        return self._start == 0 or self._complete or self.after(self._start, line)

    def after(self, step: int, line: Metrics, *, finite: bool = True, stopped: bool = False) -> bool:
        """Runs the evaluators due after `step`, unless the run is stopped, and writes the step's metrics.

        Args:
          line: training metrics.
          finite: whether the loss of the step is finite; if not, the model is not evaluated.
          stopped: the run stops here, until the same command resumes it.

        Returns:
          Whether the run continues.
        """
        if stopped:
            self._writer.write(step, line)
            return False
        due = self._due(step)
        if due and not finite:
            _log.warning("no evaluation after step %d: its loss is not finite", step)
            due = []
        scores: Metrics = {}
        if due and not self._stop.completes(lambda: scores.update(self._scores(due, step))):
            return self.after(step, line, stopped=True)
        self._writer.write(step, line | scores)
        if due:
            self._done |= {evaluator.name: step for evaluator in due}
            write_json(self._workdir / _FILE, self._done)
        return not (due and self._stop.requested())

    def _due(self, step: int) -> list[Evaluator]:
        ended = step >= self._num_steps
        return [e for e in self._evaluators if ended or (e.every and step % e.every == 0)]

    def _scores(self, due: Sequence[Evaluator], step: int) -> Metrics:
        model, frozen = self._models()
        return {
            f"{evaluator.name}/{name}": value
            for evaluator in due
            for name, value in evaluator(model, frozen, step=step, workdir=self._workdir).items()
        }
