"""Standard-library loggers, configured once for the whole package.

The environment variable VIDGEN_LOG sets the level (default INFO). With several processes each line begins
with the process index.
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
    """Logger `name`, below "vidgen".

    The first call sets the level. It also installs a handler on the root logger if the application has none,
    so that no library adds a second one there and every line is printed once.

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
    """Prefix such as "[2/8] " if there are several processes, else empty; never imports JAX."""
    distributed = sys.modules.get("jax._src.distributed")
    state = getattr(distributed, "global_state", None)
    count = getattr(state, "num_processes", None) or 1
    return f"[{getattr(state, 'process_id', 0)}/{count}] " if count > 1 else ""
