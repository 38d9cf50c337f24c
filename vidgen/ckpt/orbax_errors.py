"""Errors of Orbax and TensorStore: in one line, and without what their threads print of them on the way."""

import contextlib
import logging
import sys
from collections.abc import Iterator

__all__ = ["in_one_line", "is_of_the_machine", "without_noise"]


def in_one_line(error: BaseException) -> str:
    """An error in one line; of Orbax's errors, the one that they were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec")[0].split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error is one of the machine (its rights, its memory, its disk), not of the file."""
    missing = FileNotFoundError | NotADirectoryError | IsADirectoryError
    if isinstance(error, OSError) and not isinstance(error, missing):
        return True
    return str(error).startswith(("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Keeps from stderr what Orbax's threads say of an error on its way: it is raised, and told once."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(_of_others)
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_late(event) else unraisable(event)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for logger in loggers:
            logger.removeFilter(_of_others)


def _of_others(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno < logging.WARNING


def _is_late(event: "sys.UnraisableHookArgs") -> bool:
    """A read that ended after another had failed, and with it the event loop."""
    return isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"
