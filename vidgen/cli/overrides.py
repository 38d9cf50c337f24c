"""Experiment configs from the command line: `--config=path.py:argument --config.section.key=value`."""

import ast
import hashlib
import importlib.util
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

from vidgen.core.config import ConfigError
from vidgen.core.paths import local_path, packaged, packaged_experiments

__all__ = ["load_config"]

_OVERRIDE = re.compile(r"--?config\.([\w.]+)=(.*)", re.DOTALL)
_WITHOUT_EQUALS = re.compile(r"--?config\.[\w.]+")


def load_config(spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of `get_config` in a Python file, with the overrides put in; not checked against types yet.

    Args:
      spec: path of the file, and after a colon the argument of `get_config`, if it shall get one. A file that
        is not there is looked for among the experiments that come with vidgen, `experiments/` being optional.
      overrides: `--config.a.b=value`; values are Python literals, `true`, `false`, or else strings. Keys
        that the file leaves out may be given.

    Raises:
      ConfigError: the file is missing or wrong, or an override is no override.
      UserError: the file is on another machine.
    """
    values = _from_file(spec)
    for index, override in enumerate(overrides):
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            raise ConfigError(_no_override(override, overrides[index + 1 : index + 2]))
        _put(values, match[1].split("."), match[2])
    return values


def _no_override(text: str, following: Sequence[str]) -> str:
    if _WITHOUT_EQUALS.fullmatch(text):
        value = following[0] if following and not following[0].startswith("--") else "VALUE"
        return f'"{text}" has no value; write it with "=": {text}={value}'
    return f'"{text}" is no option; values are changed by --config.section.key=value'


def _from_file(spec: str) -> dict[str, Any]:
    name, _, argument = _split(spec)
    path = packaged(local_path(name, f"--config={spec}"))
    if not path.is_file():
        own = packaged_experiments()
        names = ", ".join(sorted(str(file.relative_to(own)) for file in own.glob("*/[a-z]*.py")))
        raise ConfigError(
            f"--config={spec}: there is no file {path}; expected FILE.py or FILE.py:ARGUMENT, of your own or "
            f"one of vidgen's: {names}"
        )
    module = _import(path, spec)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} has no function get_config")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ConfigError(f"--config={spec}: {error}") from error
    return config.to_dict()


def _split(spec: str) -> tuple[str, str, str]:
    """File, colon and argument; folders may have colons in their names."""
    if ".py:" in spec:
        file, _, argument = spec.rpartition(".py:")
        return f"{file}.py", ":", argument
    return (spec, "", "") if spec.endswith(".py") else spec.partition(":")


def _import(path: pathlib.Path, spec: str) -> types.ModuleType:
    """The module in a file. `from . import other` in it takes other.py of its folder, and nothing else does.

    The folder is a package of a name of its own, so that neither the current folder nor what is installed
    takes its place, and files that changed are read again.
    """
    folder = path.resolve().parent
    package = f"_vidgen_config_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    found = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"--config={spec}: {path} is no Python file")
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"--config={spec}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except ImportError as error:
        if not (error.name or "").startswith(package):
            raise
        missing = (error.name or "").removeprefix(package).strip(".") or str(error)
        raise ConfigError(
            f"--config={spec}: {path} imports another file of its folder, which is not there: {missing}"
        ) from error
    return module


def _put(values: dict[str, Any], path: Sequence[str], text: str) -> None:
    for depth, key in enumerate(path[:-1]):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"config.{'.'.join(path)}: {'.'.join(path[: depth + 1])} is the value {values!r}"
            )
    values[path[-1]] = text if isinstance(values.get(path[-1]), str) else _literal(text)


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
