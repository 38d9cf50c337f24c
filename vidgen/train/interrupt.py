"""Being asked to stop: SIGTERM and SIGINT, as a flag between steps, at once where nothing would be lost."""

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
"""Seconds that Python has for taking a signal before the process ends without it."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal was received where nothing would be lost. No `Exception`, as KeyboardInterrupt is none.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number


class StopSignal:
    """Within the `with` block, SIGTERM and SIGINT set `received`; a second SIGINT stops at once.

    Within `at_once` a signal raises `Stopped` instead of waiting to be asked for.

    With several processes jax's own handler of SIGTERM stays, since it is what makes them agree on a step
    (`parallel.processes.stop_requested_anywhere`), and SIGINT is passed on to it: there `at_once` waits too.
    Outside the main thread signals stay as they are.
    """

    def __init__(self, message: str = "stopped by a signal"):
        """Changes nothing yet.

        Args:
          message: of `Stopped`: what to do next.
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
                handler = self._pass_on if self._several else self._set
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def requested(self) -> bool:
        """Whether to stop here: the same answer on every process, all of which must ask equally often."""
        self._asked += 1
        return processes.stop_requested_anywhere(self._asked, self.received)

    @contextlib.contextmanager
    def at_once(self, *, end_process: bool = False) -> Iterator[None]:
        """Within it a signal, also one received before, raises `Stopped`. For work that may be done again.

        Args:
          end_process: ends the process, with the message and status 128 + signal, where Python does not take
            the signal within seconds, as while a program is compiled. For work that leaves nothing behind.

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
        """Whether `work`, which may be done again, ran to its end and was not ended by a signal."""
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

    def _pass_on(self, _number: int, _frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        os.kill(os.getpid(), signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _ending_process(message: str) -> Iterator[None]:
    """Within it a thread ends the process some time after a signal, unless the block ends before."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()

    def watch() -> None:
        # Python writes the number of each signal at once, even where its handler has to wait.
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
