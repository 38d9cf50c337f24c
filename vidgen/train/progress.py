"""Progress of a run for people: a bar on a terminal, elsewhere one line per log interval."""

import datetime
import sys
import time

from tqdm import tqdm

from vidgen.core.typing import Metrics

__all__ = ["Progress"]


class Progress:
    """Shows steps done, loss, steps/s, frames/s and the remaining time; silent if not enabled.

    The first step includes compilation: it counts as done, but in neither the rates nor the remaining time.
    """

    def __init__(self, *, start: int, total: int, enabled: bool = True):
        """Prints nothing until entered.

        Args:
          start: steps that are done already.
          total: steps of the whole run.
        """
        self._done, self._total, self._enabled = start, total, enabled
        self._bar: tqdm | None = None
        self._first: dict[str, float] | None = None
        """Rates of the first step."""
        self._since, self._steps, self._frames = time.monotonic(), 0, 0

    def advance(self, frames: int) -> None:
        """Counts one step of `frames` frames."""
        self._done += 1
        self._steps += 1
        self._frames += frames
        if self._bar is not None:
            self._bar.update()
        elif self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format="{n_fmt}/{total_fmt} {bar:20} {elapsed}<{remaining} {rate_fmt}{postfix}",
            )
        if self._first is None:
            self._first = self._rates()
            self._start_interval()

    def rates(self) -> dict[str, float]:
        """Steps and frames per second since the last call; those of the first step if there was no other."""
        rates = self._rates() if self._steps or self._first is None else self._first
        self._start_interval()
        return rates

    def show(self, metrics: Metrics) -> None:
        """Shows the loss and the rates in `metrics`."""
        loss, frames = f"loss={metrics['loss']:.4f}", f"{metrics['frames_per_second']:.1f} frames/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{loss} {frames}")
        elif self._enabled:
            rate = metrics["steps_per_second"]
            remaining = datetime.timedelta(seconds=round((self._total - self._done) / max(rate, 1e-9)))
            known = self._first is not None and rate != self._first["steps_per_second"]
            line = f"step {self._done}/{self._total} {loss} {rate:.3g} steps/s {frames}"
            _say(f"{line}, {remaining} left" if known else line)

    def _rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {"steps_per_second": self._steps / seconds, "frames_per_second": self._frames / seconds}

    def _start_interval(self) -> None:
        self._since, self._steps, self._frames = time.monotonic(), 0, 0

    def __enter__(self) -> "Progress":
        if self._enabled and self._done < self._total:
            _say(f"step {self._done + 1}/{self._total}: compiling")
        self._start_interval()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
