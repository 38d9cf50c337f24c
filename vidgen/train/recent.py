"""The steps since the last line of the log: their metrics, still on the device, and their clips."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from vidgen.core.typing import Metrics

__all__ = ["NonFiniteLoss", "RecentSteps"]

_IN_FLIGHT = 2
"""Steps that the host may be ahead of the device: enough to hide the loading, few enough to bound memory."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not finite; the message says at which step, and where its clips are."""


class RecentSteps:
    """Gathers metrics without waiting for them; they are fetched when a line or a checkpoint needs them."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._steps: list[tuple[int, list[str], Metrics]] = []
        self._fetched: list[Metrics] = []

    def add(self, step: int, batch: Mapping[str, Any], metrics: Metrics) -> None:
        """Notes a step that was started."""
        self._steps.append((step, list(batch["name"]), metrics))
        if len(self._steps) > _IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _IN_FLIGHT][2]["loss"])

    def check(self) -> None:
        """Waits for the steps noted so far.

        Raises:
          NonFiniteLoss: one of them; its clips are in nonfinite_<step>.json.
        """
        steps, self._steps = self._steps, []
        for (step, names, _), metrics in zip(steps, jax.device_get([m for *_, m in steps]), strict=True):
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                self._report(step, names, metrics)
            self._fetched.append(metrics)

    def means(self) -> Metrics:
        """The mean of each metric over the steps since the last call; checks them first."""
        self.check()
        fetched, self._fetched = self._fetched, []
        return {name: float(sum(m[name] for m in fetched) / len(fetched)) for name in fetched[0]}

    def _report(self, step: int, names: list[str], metrics: Metrics) -> None:
        index = jax.process_index()
        path = self._workdir / f"nonfinite_{step}{f'.{index}' if index else ''}.json"
        values = {name: float(value) for name, value in metrics.items()}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"step": step, "clips": names, "metrics": {k: str(v) for k, v in values.items()}})
        )
        os.replace(temporary, path)
        raise NonFiniteLoss(
            f"step {step}: loss is {values['loss']}, norm of the gradient is {values['grad_norm']}. "
            f"The clips of this batch are named in {path}; nothing was saved since the last checkpoint, from "
            "which the same command goes on. "
            "Look at the clips, or lower optimizer.learning_rate or run.grad_clip."
        )
