"""Work that SIGINT and SIGTERM must not break off."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

from vidgen.core.logging import get_logger

__all__ = ["deferred_signals"]

_log = get_logger(__name__)


@contextlib.contextmanager
def deferred_signals(what: str, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Signals that arrive within the block take effect at its end; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread, and for signals whose handler is not Python's, nothing changes.

    Args:
      what: the work, for the log line that says why nothing seems to happen.
      numbers: the signals.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        name = signal.Signals(number).name
        _log.warning("%s takes effect when %s is done; a second Ctrl-C gives it up", name, what)

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
