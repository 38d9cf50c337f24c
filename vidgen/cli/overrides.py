"""Experiment configs from the command line: `--config=path.py:argument --config.section.key=value`."""

import ast
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from vidgen.core.config import ConfigError

__all__ = ["load_config"]

_OVERRIDE = re.compile(r"--?config\.([\w.]+)=(.*)", re.DOTALL)


def load_config(spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of `get_config` in a Python file, with the overrides put in; not checked against types yet.

    Args:
      spec: path of the file, and after a colon the argument of `get_config`, if it shall get one.
      overrides: `--config.a.b=value`; values are Python literals, `true`, `false`, or else strings. Keys
        that the file leaves out may be given.

    Raises:
      ConfigError: the file is missing or wrong, or an override is no override.
    """
    values = _from_file(spec)
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            raise ConfigError(f'"{override}" is no option; values are changed by --config.section.key=value')
        _put(values, match[1].split("."), match[2])
    return values


def _from_file(spec: str) -> dict[str, Any]:
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ConfigError(f"--config={spec}: there is no file {path}; expected FILE.py or FILE.py:ARGUMENT")
    found = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"--config={spec}: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} has no function get_config")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ConfigError(f"--config={spec}: {error}") from error
    return config.to_dict()


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
