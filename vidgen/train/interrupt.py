"""Being asked to stop: SIGTERM and SIGINT become a flag that the loop reads between steps."""

import os
import signal
import threading

import jax

__all__ = ["StopSignal"]


class StopSignal:
    """Within the `with` block, SIGTERM and SIGINT set `received`; a second SIGINT stops at once.

    With several processes jax's own handler of SIGTERM stays, since it is what makes them agree on a step
    (`parallel.processes.stop_requested_anywhere`), and SIGINT is passed on to it. Outside the main thread
    signals stay as they are.
    """

    def __init__(self):
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._pass_on if several else self._set)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _set(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def _pass_on(self, _number: int, _frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        os.kill(os.getpid(), signal.SIGTERM)
