"""Deferral of SIGINT and SIGTERM during work that they must not interrupt."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

from vidgen.core.logging import get_logger

__all__ = ["deferred_signals"]

_log = get_logger(__name__)


@contextlib.contextmanager
def deferred_signals(what: str, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Defers signals to the end of the block; a second SIGINT raises KeyboardInterrupt.

    Has no effect outside the main thread, or on signals whose handler was not installed from Python.

    Args:
      what: description of the work, for the log line about the delay.
      numbers: signals to defer.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        name = signal.Signals(number).name
        _log.warning("%s takes effect when %s is done; a second Ctrl-C aborts it", name, what)

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.getsignal(number) for number in (numbers if main else ())}
    previous = {number: handler for number, handler in previous.items() if handler is not None}
    for number in previous:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(received):
            signal.raise_signal(number)
