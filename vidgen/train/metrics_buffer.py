"""Metrics of the steps since the last log line, still on the device, with the names of their clips."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from vidgen.core.logging import get_logger
from vidgen.core.typing import Metrics
from vidgen.train.metrics import drop_after

__all__ = ["MetricsBuffer", "NonFiniteLoss"]

_log = get_logger(__name__)

_IN_FLIGHT = 2
"""Steps by which the host may be ahead of the device: enough to hide loading, few enough to bound memory."""


class NonFiniteLoss(RuntimeError):
    """The loss or gradient stays not finite; the message says since when, and where the clips are listed."""


class MetricsBuffer:
    """Collects metrics without waiting for them; fetches them for a log line or a checkpoint.

    A step whose loss or gradient is not finite changes nothing (`make_train_step`): it counts as `skipped`,
    is left out of the means, and its clips are listed in `workdir`/nonfinite.jsonl.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        stop_after: int,
        start: int = 0,
        state: Mapping[str, Any] | None = None,
    ):
        """Continues after step `start`.

        Args:
          stop_after: number of consecutive steps that are not finite at which to raise.
          start: steps done.
          state: result of `state` after that step.
        """
        index = jax.process_index()
        self._path = workdir / f"nonfinite{f'.{index}' if index else ''}.jsonl"
        drop_after(self._path, start)
        self._stop_after = stop_after
        self._steps: list[tuple[int, list[str], Metrics]] = []
        state = state or {}
        self._sums: dict[str, float] = dict(state.get("sums", {}))
        # Older runs saved one number for all metrics.
        counted: int = state.get("counted", 0)
        self._counts: dict[str, int] = dict(state.get("counts") or dict.fromkeys(self._sums, counted))
        self._skipped: int = state.get("skipped", 0)
        self._in_a_row: int = state.get("in_a_row", 0)
        self._checked = start

    def add(self, step: int, batch: Mapping[str, Any], metrics: Metrics) -> None:
        """Records a step that was started, or a skipped one, which has no metrics."""
        self._steps.append((step, list(batch["name"]), metrics))
        if len(self._steps) > _IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _IN_FLIGHT][2])

    @property
    def finite(self) -> bool:
        """Whether the newest checked step is finite."""
        return self._in_a_row == 0

    def check(self, *, last: bool = False) -> None:
        """Waits for the recorded steps and checks them.

        Args:
          last: the run ends with the newest step, which must then be finite.

        Raises:
          NonFiniteLoss: too many consecutive steps are not finite, or the last one is not.
        """
        steps, self._steps = self._steps, []
        for (step, names, _), metrics in zip(steps, jax.device_get([m for *_, m in steps]), strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            self._checked = step
            if not values:
                self._skipped += 1
                self._in_a_row = 0
            elif all(math.isfinite(values[name]) for name in values if _decides(name)):
                self._in_a_row = 0
                for name, value in values.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value
                    self._counts[name] = self._counts.get(name, 0) + 1
            else:
                self._skip(step, names, values)
        if last and not self.finite:
            self._give_up()

    def means(self) -> Metrics:
        """Mean of each metric over the steps since the last call that have it, and the skipped steps' number.

        If all were skipped, there are no other metrics. Checks the steps first.
        """
        self.check()
        means: Metrics = {name: value / self._counts[name] for name, value in self._sums.items()}
        means["skipped"] = float(self._skipped)
        self._sums, self._counts, self._skipped = {}, {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """JSON-able state of the checked steps, equal on all processes."""
        return {
            "sums": self._sums,
            "counts": self._counts,
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
        }

    def _skip(self, step: int, names: list[str], values: Metrics) -> None:
        self._skipped += 1
        self._in_a_row += 1
        # As strings: JSON has no infinity and NaN.
        shown = {name: str(value) for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "clips": names, "metrics": shown}) + "\n")
        _log.warning(
            "step %d skipped: loss is %s, norm of the gradient is %s; its clips are in %s",
            step,
            values["loss"],
            values["grad_norm"],
            self._path,
        )
        if self._in_a_row >= self._stop_after:
            self._give_up()

    def _give_up(self) -> None:
        step = self._checked
        first = step - self._in_a_row + 1
        raise NonFiniteLoss(
            f"steps {first} to {step}: the loss or its gradient is not finite. Their clips are in "
            f"{self._path}; the checkpoints are unchanged. Look at these clips. The same command skips "
            f"them with --config.run.skip_steps=[[{first},{step}]]. Where the loss rose before, also "
            "give a lower --config.optimizer.learning_rate or --config.run.grad_clip, and remove the folders "
            "of checkpoints newer than the rise: the run then goes on from before it."
        )


def _decides(name: str) -> bool:
    """Whether a step is skipped if this metric is not finite: the losses and the gradient's norm."""
    return name in ("loss", "grad_norm") or name.endswith("/loss")
