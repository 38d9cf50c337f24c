"""Errors of Orbax and TensorStore: shortened to one line, without output from background threads."""

import contextlib
import logging
import sys
from collections.abc import Iterator

__all__ = ["in_one_line", "is_of_the_machine", "without_noise"]


def in_one_line(error: BaseException) -> str:
    """Message of an error's root cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec")[0].split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def is_of_the_machine(error: Exception) -> bool:
    """Whether the machine (permissions, memory, disk) caused an error, not the file."""
    missing = FileNotFoundError | NotADirectoryError | IsADirectoryError
    if isinstance(error, OSError) and not isinstance(error, missing):
        return True
    return str(error).startswith(("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Suppresses what Orbax's threads print about an error that is raised anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(_is_not_orbax_warning)
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_late(event) else unraisable(event)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for logger in loggers:
            logger.removeFilter(_is_not_orbax_warning)


def _is_not_orbax_warning(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno < logging.WARNING


def _is_late(event: "sys.UnraisableHookArgs") -> bool:
    """Whether a read ended after another had failed and closed the event loop."""
    return isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"
