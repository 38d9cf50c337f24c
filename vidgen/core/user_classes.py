"""Classes of users in configs, which saved configs name as `"class": "module:Name"` or `"file.py:Name"`.

To name a class executes nothing. To load one that is not imported yet imports its module, which executes it:
this needs the user's word (`trusting`, or `--trust` on the command line).
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from vidgen.core.errors import UserError

__all__ = ["CLASS", "class_name", "import_file", "is_user_class", "load_class", "trusting"]

CLASS = "class"
"""Key of the class's name among the values of its fields."""

_FOLDER_PACKAGE = "_vidgen_config_"
_trusted = contextvars.ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Lets `load_class` import modules inside the block if `trust` is true."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def is_user_class(cls: type) -> bool:
    """Whether a class is defined outside vidgen."""
    return cls.__module__.partition(".")[0] != "vidgen"


def class_name(cls: type) -> str:
    """Name under which `load_class` finds the class.

    Raises:
      UserError: the class is defined inside a function or in a notebook's or program's `__main__`.
    """
    module = sys.modules.get(cls.__module__)
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__" or module is None:
        raise UserError(
            f"{cls.__qualname__} of {cls.__module__} cannot be named in a saved config: define it at the top "
            "of a Python file that can be imported"
        )
    if cls.__module__.startswith(_FOLDER_PACKAGE):
        return f"{module.__file__}:{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def load_class(name: Any, where: str) -> type:
    """The frozen dataclass of a name from `class_name`.

    Args:
      where: beginning of error messages.

    Raises:
      UserError: the name has another form; its module is not imported and not trusted, or cannot be
        imported; or there is no such frozen dataclass in it.
    """
    if not isinstance(name, str) or ":" not in name:
        raise UserError(f'{where}.{CLASS}: found {name!r}, expected "module:Name" or "file.py:Name"')
    place, _, qualified = name.rpartition(":")
    found: Any = _module(place, f"{where}.{CLASS}: {name}")
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or not _is_frozen(found):
        raise UserError(f"{where}.{CLASS}: {name} is no frozen dataclass: it must be one to be an option")
    return found


def import_file(path: pathlib.Path, *, again: bool = True) -> types.ModuleType:
    """Imports a file as a module; `from . import other` in it imports other.py of the same folder.

    The folder becomes a package with a unique name, so that neither the current folder nor an installed
    package shadows it.

    Args:
      again: reads the files of this folder again that were imported before.

    Raises:
      ImportError: the file is no Python file, or what it imports is missing.
    """
    package = _package(path)
    if again:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
    found = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file", name=package)
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path.resolve().parent)]
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def _package(path: pathlib.Path) -> str:
    return _FOLDER_PACKAGE + hashlib.sha256(str(path.resolve().parent).encode()).hexdigest()[:16]


def _module(place: str, what: str) -> types.ModuleType:
    """A module that is imported already, or that the user trusts."""
    path = pathlib.Path(place)
    is_file = place.endswith(".py")
    imported = sys.modules.get(f"{_package(path)}.{path.stem}" if is_file else place)
    if imported is not None:
        return imported
    if not _trusted.get():
        raise UserError(
            f"{what} is a class of its author, and importing it executes code: if you trust it, repeat the "
            "command with --trust (in Python: vidgen.load(path, trust=True))"
        )
    if is_file and not path.is_file():
        raise UserError(f"{what}: there is no file {path}: put it there, or correct the path in the config")
    try:
        return import_file(path, again=False) if is_file else importlib.import_module(place)
    except ImportError as error:
        raise UserError(f"{what} cannot be imported ({error}): install it, or set PYTHONPATH") from error


def _is_frozen(cls: Any) -> bool:
    return cls.__dataclass_params__.frozen
