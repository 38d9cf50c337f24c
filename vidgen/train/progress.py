"""What a person sees of a run: one line that is rewritten."""

import sys
import time

from tqdm import tqdm

from vidgen.core.typing import Metrics

__all__ = ["Progress"]


class Progress:
    """A progress bar with loss, steps/s, frames/s and the time that is left; silent where not enabled."""

    def __init__(self, *, start: int, total: int, enabled: bool = True):
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not enabled,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            # What is no terminal keeps every line.
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
            bar_format="{n_fmt}/{total_fmt} {bar:20} {elapsed}<{remaining} {rate_fmt}{postfix}",
        )
        self._since, self._steps, self._frames = time.monotonic(), 0, 0

    def advance(self, frames: int) -> None:
        """Counts one step over `frames` frames."""
        self._steps += 1
        self._frames += frames
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """Steps and frames per second since the last call."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rates = {"steps_per_second": self._steps / seconds, "frames_per_second": self._frames / seconds}
        self._since, self._steps, self._frames = now, 0, 0
        return rates

    def show(self, metrics: Metrics) -> None:
        """Puts the loss and the rate of frames behind the bar."""
        self._bar.set_postfix_str(f"loss={metrics['loss']:.4f} {metrics['frames_per_second']:.1f} frames/s")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
