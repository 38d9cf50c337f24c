"""Reads experiment configs from the command line: `--config=path.py:argument --config.section.key=value`."""

import ast
import pathlib
import re
import types
from collections.abc import Sequence
from typing import Any

from vidgen.core.config import ConfigError, to_dict
from vidgen.core.paths import local_path, packaged, packaged_experiments
from vidgen.core.user_classes import import_file

__all__ = ["load_config"]

_OVERRIDE = re.compile(r"--?config\.([\w.]+)=(.*)", re.DOTALL)
_WITHOUT_EQUALS = re.compile(r"--?config\.[\w.]+")


def load_config(spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The values that `get_config` of a Python file returns, with overrides applied; types are not checked.

    Args:
      spec: path of the file, optionally followed by a colon and the argument of `get_config`. A path that
        does not exist is looked up among the experiments installed with vidgen, with or without
        `experiments/`.
      overrides: `--config.a.b=value`; values are Python literals, `true`, `false`, or otherwise strings.
        They may set keys that the file leaves out.

    Raises:
      ConfigError: the file is missing or invalid, or an override has the wrong form.
      UserError: the path is remote.
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
        installed = packaged_experiments()
        names = ", ".join(sorted(str(file.relative_to(installed)) for file in installed.glob("*/[a-z]*.py")))
        raise ConfigError(
            f"--config={spec}: there is no file {path}; expected FILE.py or FILE.py:ARGUMENT, your file or "
            f"one of vidgen's: {names}"
        )
    module = _import(path, spec)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} has no function get_config")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ConfigError(f"--config={spec}: {error}") from error
    # Instances of users' classes become mappings, which overrides can change.
    return to_dict(config)


def _split(spec: str) -> tuple[str, str, str]:
    """Splits a spec into file, colon and argument; folder names may contain colons."""
    if ".py:" in spec:
        file, _, argument = spec.rpartition(".py:")
        return f"{file}.py", ":", argument
    return (spec, "", "") if spec.endswith(".py") else spec.partition(":")


def _import(path: pathlib.Path, spec: str) -> types.ModuleType:
    if path.suffix != ".py":
        raise ConfigError(f"--config={spec}: {path} is no Python file")
    try:
        return import_file(path)
    except SyntaxError as error:
        raise ConfigError(f"--config={spec}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except ImportError as error:
        package, _, missing = (error.name or "").partition(".")
        if not package.startswith("_vidgen_config_"):
            raise
        raise ConfigError(
            f"--config={spec}: {path} imports another file of its folder, which is not there: "
            f"{missing or error}"
        ) from error


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
