"""Loggers of the standard library, set up once for the whole package.

The level comes from the environment variable VIDGEN_LOG (default INFO). With more than one process each line
carries the process index.
"""

import logging
import os
import sys
import threading

from vidgen.core.errors import UserError

__all__ = ["get_logger"]

_PACKAGE = "vidgen"
_lock = threading.Lock()


class _Handler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which tests and notebooks replace."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _process_prefix() + super().format(record)


def get_logger(name: str = _PACKAGE) -> logging.Logger:
    """The logger `name`, below "vidgen".

    The first call sets the level, and installs a handler where the application has none: on the root
    logger, so that no library puts a second one there and every line comes once.

    Raises:
      UserError: VIDGEN_LOG is not the name of a level.
    """
    package = logging.getLogger(_PACKAGE)
    with _lock:
        if package.level == logging.NOTSET:
            package.setLevel(_level())
        if not logging.root.handlers:
            handler = _Handler()
            handler.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
            logging.root.addHandler(handler)
    if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
        return logging.getLogger(name)
    return logging.getLogger(f"{_PACKAGE}.{name}")


def _level() -> int:
    name = os.environ.get("VIDGEN_LOG", "INFO").upper()
    levels = logging.getLevelNamesMapping()
    if name not in levels:
        raise UserError(f'VIDGEN_LOG is "{name}", expected one of {", ".join(sorted(levels))}')
    return levels[name]


def _process_prefix() -> str:
    """With several processes, "[2/8] "; read from jax only where jax has been imported."""
    distributed = sys.modules.get("jax._src.distributed")
    state = getattr(distributed, "global_state", None)
    count = getattr(state, "num_processes", None) or 1
    return f"[{getattr(state, 'process_id', 0)}/{count}] " if count > 1 else ""
