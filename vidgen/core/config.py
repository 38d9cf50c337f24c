"""Conversion of nested mappings, from experiments and commands, to frozen dataclasses and back.

`resolve` is the last function that sees a `ConfigDict`. After it every option is a typed field, so a misspelt
key or a value of the wrong type is an error before anything is built.
"""

import dataclasses
import difflib
import functools
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar, Union

from vidgen.core.errors import UserError
from vidgen.core.limits import Limit
from vidgen.core.paths import require_local
from vidgen.core.user_classes import CLASS, class_name, is_user_class, load_class

__all__ = ["ConfigError", "nearest", "resolve", "to_dict"]

T = TypeVar("T")

_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


class ConfigError(UserError):
    """An invalid configuration; the message names the key, what was found and what is expected."""


def resolve(cls: type[T] | Any, values: Any, where: str = "config") -> T:
    """Instance of `cls` built from the fields in `values`.

    Accepted: an int for a float, a list for a tuple, None for an optional field, and an instance that already
    has the right class. In a union of dataclasses, the mapping's `kind` selects the member by its field
    `kind: Literal["x"] = "x"`. A union with a Protocol also takes an instance of a user's frozen dataclass
    that fills this role, or a mapping with its name under `class` (`vidgen.core.user_classes`).

    Args:
      cls: a dataclass, or a union of dataclasses.
      values: a mapping (or ConfigDict) of field names; nested for fields that are dataclasses.
      where: the name of the outermost mapping in error messages.

    Raises:
      ConfigError: unknown or missing key, wrong type, or a ValueError from a `__post_init__`.
    """
    return _convert(cls, values, where)


def to_dict(obj: Any) -> Any:
    """Inverse of `resolve`: `obj` as dicts, lists and JSON scalars.

    Raises:
      ConfigError: a value that JSON cannot represent.
    """
    return _plain(obj, "config")


def nearest(name: str, names: Sequence[str]) -> str:
    """Sentence that suggests the member of `names` closest to `name` and lists the valid ones."""
    if not names:
        return "none are valid here"
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f'did you mean "{closest}"? Valid: {", ".join(sorted(names))}'


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        named = {CLASS: class_name(type(value))} if is_user_class(type(value)) else {}
        return named | {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if _is_mapping(value):
        return {str(key): _plain(value[key], f"{where}.{key}") for key in value}
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{where}: found {_describe(value)}, which JSON cannot hold; use numbers, strings, lists"
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `hint`, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        converted = _convert(args[0], value, where)
        for limit in hint.__metadata__:
            if isinstance(limit, Limit) and not limit.holds(converted):
                raise _wrong(where, value, str(limit))
        return converted
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        return _convert_literal(args, value, where)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(hint, value, where)
    if (origin or hint) in _SEQUENCES:
        return _convert_sequence(origin or hint, args, value, where)
    if (origin or hint) in _MAPPINGS:
        if not _is_mapping(value):
            raise _wrong(where, value, "a mapping")
        inner = args[1] if args else Any
        return {key: _convert(inner, value[key], f"{where}.{key}") for key in value}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is None or hint is types.NoneType:
        if value is None:
            return None
        raise _wrong(where, value, "None")
    if not isinstance(hint, type):
        raise TypeError(f"{where}: a field annotated {hint} cannot be filled from a config")
    if hint in (int, float) and isinstance(value, bool):
        raise _wrong(where, value, hint.__name__)
    if hint is float and isinstance(value, int):
        return float(value)
    if isinstance(value, str):
        require_local(value, where)
        if issubclass(hint, pathlib.PurePath):
            return hint(value)
    if not isinstance(value, hint):
        raise _wrong(where, value, hint.__name__)
    return value


def _convert_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    if isinstance(value, str) and all(isinstance(choice, str) for choice in choices):
        raise ConfigError(f'{where}: unknown value "{value}"; {nearest(value, choices)}')
    raise _wrong(where, value, "one of " + ", ".join(repr(choice) for choice in choices))


def _convert_sequence(kind: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    fixed = kind is tuple and bool(args) and Ellipsis not in args
    if fixed and len(value) != len(args):
        raise ConfigError(f"{where}: found {len(value)} values {value!r}, expected {len(args)}")
    hints = args if fixed else (args[0] if args else Any,) * len(value)
    items = [
        _convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    ]
    return items if kind is list else tuple(items)


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    classes = [m for m in members if dataclasses.is_dataclass(m)]
    roles = [m for m in members if getattr(m, "_is_protocol", False)]
    if type(value) in classes:
        return value
    if roles and _is_mapping(value) and CLASS in value:
        user_class = load_class(value[CLASS], where)
        rest = {key: value[key] for key in value if key != CLASS}
        value = _convert_dataclass(user_class, rest, where)
    if roles and dataclasses.is_dataclass(value):
        return _in_role(value, roles, where)
    if classes and _is_mapping(value):
        chosen = classes[0] if len(classes) == 1 else _choose(classes, value, where)
        return _convert(chosen, value, where)
    # Try the value's exact type first: `float | int` keeps an int.
    others = sorted(
        (m for m in members if m not in [*classes, *roles] and m is not types.NoneType),
        key=lambda m: m is not type(value),
    )
    for member in others:
        try:
            return _convert(member, value, where)
        except ConfigError:
            # With a single candidate its own message is better: it names the range.
            if len(others) == 1 and (not classes or isinstance(value, int | float)):
                raise
    raise _wrong(where, value, " or ".join(_name(m) for m in members))


def _in_role(value: Any, roles: Sequence[Any], where: str) -> Any:
    """`value`, an instance of a user's class, if it fills one of the roles."""
    if any(isinstance(value, role) for role in roles):
        return value
    missing = [name for name in _members(roles[0]) if not hasattr(value, name)]
    raise ConfigError(
        f"{where}: {type(value).__name__} does not fill the role {roles[0].__name__}: it lacks "
        f"{', '.join(missing)}"
    )


def _members(role: Any) -> list[str]:
    """Public names of a Protocol."""
    bases = [base for base in role.__mro__ if getattr(base, "_is_protocol", False)]
    names = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return sorted(name for name in names if not name.startswith("_"))


def _choose(classes: Sequence[Any], values: Any, where: str) -> Any:
    """The union member with the `kind` given in the mapping."""
    by_kind = {kind: cls for cls in classes for kind in _kinds(cls)}
    if "kind" not in values:
        raise ConfigError(f'{where}: missing key "kind"; expected one of {", ".join(sorted(by_kind))}')
    kind = values["kind"]
    if not isinstance(kind, str) or kind not in by_kind:
        raise ConfigError(f'{where}.kind: unknown value "{kind}"; {nearest(str(kind), list(by_kind))}')
    return by_kind[kind]


def _kinds(cls: Any) -> tuple[str, ...]:
    hint = _hints(cls).get("kind")
    if typing.get_origin(hint) is not Literal:
        raise TypeError(f'{cls.__name__} is a member of a union and needs a field kind: Literal["..."]')
    return typing.get_args(hint)


def _convert_dataclass(cls: Any, values: Any, where: str) -> Any:
    if isinstance(values, cls):
        return values
    if not _is_mapping(values):
        raise _wrong(where, values, f"a mapping with the fields of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if CLASS in values and values[CLASS] == f"{cls.__module__}:{cls.__qualname__}":
        values = {key: values[key] for key in values if key != CLASS}
    for key in values:
        if key not in fields:
            raise ConfigError(
                f'{where}.{key}: unknown key "{key}" for {cls.__name__}; {nearest(str(key), list(fields))}'
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(
                f"{where}.{name}: missing; {cls.__name__} needs it (type {_name(_hints(cls)[name])})"
                f"{_remedy(f'{where}.{name}')}"
            )
    arguments = {key: _convert(_hints(cls)[key], values[key], f"{where}.{key}") for key in values}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """True also for a ConfigDict, which has keys and items but is not a `Mapping`."""
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def _name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )


def _describe(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} of type {type(value).__name__}"


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    remedy = _remedy(where) if value is None else ""
    return ConfigError(f"{where}: found {_describe(value)}, expected {expected}{remedy}")


def _remedy(where: str) -> str:
    """The command-line option that sets the value; empty if `where` is not a config key."""
    kind = "DIR" if where.endswith("path") else "VALUE"
    return f": give --{where}={kind}" if re.fullmatch(r"config(\.\w+)+", where) else ""
