"""Where the numbers of a run go: metrics.jsonl and TensorBoard, behind one writer."""

import json
import os
import pathlib
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from vidgen.core.typing import Metrics

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Writes scalars by step to `workdir`/metrics.jsonl and `workdir`/tensorboard.

    Opened for a run that resumes, it first drops the lines after the step that the run resumes from, so each
    step is there once.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int = 0, enabled: bool = True):
        """Opens the files.

        Args:
          resume_step: lines of later steps are dropped.
          enabled: False on the processes that do not write.
        """
        self._enabled = enabled
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_after(path, resume_step)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, and one scalar per metric; nothing for no metrics."""
        if not self._enabled or not metrics:
            return
        values: Metrics = {name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._enabled:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the whole lines up to `step`; a line that a killed run left half-written goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
