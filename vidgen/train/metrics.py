"""One writer for the metrics of a run: metrics.jsonl and TensorBoard."""

import json
import os
import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from vidgen.core.files import replacing
from vidgen.core.typing import Metrics

__all__ = ["MetricsWriter", "drop_after"]


class MetricsWriter:
    """Writes scalars by step to `workdir`/metrics.jsonl and `workdir`/tensorboard.

    On resume it first drops the lines after the step that the run resumes from, so each step appears once.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int = 0, enabled: bool = True):
        """Opens the files.

        Args:
          resume_step: lines of later steps are dropped.
          enabled: False on processes that do not write.
        """
        self._enabled = enabled
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._folder, self._resume_step = workdir / "tensorboard", resume_step
        self._board: EventsWriter | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and flushes one line, and one TensorBoard scalar per metric; nothing for no metrics."""
        if not self._enabled or not metrics:
            return
        if self._board is None:
            # Opened at the first write: each writer creates a file.
            self._board = _board(self._folder, self._resume_step + 1)
        # Sorted: a checkpoint does not preserve the order of metrics.
        values: Metrics = {name: float(metrics[name]) for name in sorted(metrics)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if not self._enabled:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _board(folder: pathlib.Path, purge_step: int) -> EventsWriter:
    """TensorBoard file that hides events of older files from `purge_step` on.

    Events are in the file once it is flushed, unlike with `SummaryWriter`, whose thread writes at any time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    board = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    start = SessionLog(status=SessionLog.START)
    board.write_event(Event(step=purge_step, wall_time=time.time(), session_log=start))
    return board


def drop_after(path: pathlib.Path, step: int) -> None:
    """Drops JSON lines of steps after `step`, and a line that a killed run left incomplete."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    remaining = [line for line in lines if _step_of(line) <= step]
    if remaining != lines:
        with replacing(path) as temporary:
            temporary.write_text("".join(remaining), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
