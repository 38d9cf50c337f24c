"""SIGTERM and SIGINT as a stop flag between steps, or at once where no work would be lost."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from vidgen.parallel import processes

__all__ = ["StopSignal", "Stopped"]

_GRACE = 2.0
"""Seconds for Python to handle a signal before the process is ended."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal arrived where no work would be lost. Not an `Exception`, like KeyboardInterrupt.

    Attributes:
      number: signal number.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number


class StopSignal:
    """Context manager: SIGTERM and SIGINT set `received`; a second SIGINT stops at once.

    Inside `at_once` a signal raises `Stopped` immediately.

    With several processes JAX's SIGTERM handler stays, since through it they agree on a step
    (`parallel.processes.stop_requested_anywhere`). SIGINT is forwarded to it, and `at_once` has no effect.
    Outside the main thread signal handlers are unchanged.
    """

    def __init__(self, message: str = "stopped by a signal"):
        """Installs no handlers yet.

        Args:
          message: message of `Stopped`: what to do next.
        """
        self.received = False
        self.message = message
        self._asked = 0
        self._at_once = False
        self._several = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if _in_main_thread():
            self._several = jax.process_count() > 1
            for number in (signal.SIGINT,) if self._several else _NUMBERS:
                handler = self._forward if self._several else self._set
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def requested(self) -> bool:
        """Whether to stop here: equal on all processes, which must call this equally often."""
        self._asked += 1
        return processes.stop_requested_anywhere(self._asked, self.received)

    @contextlib.contextmanager
    def at_once(self, *, end_process: bool = False) -> Iterator[None]:
        """Block in which a signal, also one received before, raises `Stopped`; for repeatable work.

        Args:
          end_process: ends the process, with the message and status 128 + signal, if Python does not handle
            the signal within seconds, e.g. during compilation. For work that leaves nothing behind.

        Raises:
          Stopped: a signal was received.
        """
        if self._several or not _in_main_thread():
            yield
            return
        if self.received:
            raise Stopped(self.message)
        with _ending_process(self.message) if end_process else contextlib.nullcontext():
            self._at_once = True
            try:
                yield
            finally:
                self._at_once = False

    def completes(self, work: Callable[[], object]) -> bool:
        """Runs `work`, which must be repeatable; returns whether it ended without a signal."""
        try:
            with self.at_once():
                work()
        except Stopped:
            return False
        return True

    def _set(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._at_once:
            self._at_once = False
            raise Stopped(self.message, number)

    def _forward(self, _number: int, _frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        os.kill(os.getpid(), signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _ending_process(message: str) -> Iterator[None]:
    """Block in which a thread ends the process some time after a signal, unless the block ends first."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()

    def watch() -> None:
        # Python writes the signal's number at once, even while its handler has to wait.
        while (number := os.read(reader, 1)[0]) not in (0, *_NUMBERS):
            pass
        if number and not ended.wait(_GRACE):
            print(f"vidgen: {message}", file=sys.stderr, flush=True)
            os._exit(128 + number)

    thread = threading.Thread(target=watch, daemon=True)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
