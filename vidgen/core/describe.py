"""Fields of frozen dataclasses with their types, defaults and documentation, for display."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from vidgen.core.config import ConfigError, nearest

__all__ = ["Field", "fields_of", "find_classes", "list_values"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One option.

    Attributes:
      name: dotted path of the option, or the field's name in its class.
      type: the annotation, with the range of a number.
      value: current value or default; `REQUIRED` if there is none.
      doc: entry in the class's docstring; empty if there is none.
    """

    name: str
    type: str
    value: str
    doc: str


REQUIRED = "(to be given)"


def fields_of(cls: Any) -> list[Field]:
    """Fields of a dataclass, with their defaults."""
    docs, hints = _docs(cls), typing.get_type_hints(cls, include_extras=True)
    fields = []
    for field in dataclasses.fields(cls):
        value = REQUIRED
        if field.default is not dataclasses.MISSING:
            value = _shown(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            value = _shown(field.default_factory())
        name = _type(hints[field.name])
        fields.append(Field(name=field.name, type=name, value=value, doc=docs.get(field.name, "")))
    return fields


def list_values(obj: Any, where: str) -> Iterator[Field]:
    """Yields every option below `obj`, a dataclass instance, in field order.

    Args:
      where: dotted path of `obj`, the prefix of the names.
    """
    docs, hints = _docs(type(obj)), typing.get_type_hints(type(obj), include_extras=True)
    for field in dataclasses.fields(obj):
        value, name = getattr(obj, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from list_values(value, name)
        elif isinstance(value, tuple | list) and any(map(dataclasses.is_dataclass, value)):
            for index, item in enumerate(value):
                yield from list_values(item, f"{name}[{index}]")
        else:
            kind = _type(hints[field.name])
            yield Field(name=name, type=kind, value=_shown(value), doc=docs.get(field.name, ""))


def find_classes(cls: Any, place: str) -> list[Any]:
    """Dataclasses that a dotted path below `cls` may hold, across all members of unions.

    Raises:
      ConfigError: the path does not exist (the message lists the valid names), or holds a plain value.
    """
    found = [cls]
    seen = ""
    for name in filter(None, place.split(".")):
        hints = [(c, typing.get_type_hints(c, include_extras=True)) for c in found]
        names = sorted({field for _, hint in hints for field in hint})
        seen = f"{seen}.{name}" if seen else name
        if name not in names:
            raise ConfigError(f'config.{seen}: unknown key "{name}"; {nearest(name, names)}')
        found = [c for _, hint in hints if name in hint for c in _dataclasses(hint[name])]
        found = list(dict.fromkeys(found))
        if not found:
            kinds = sorted({_type(hint[name]) for _, hint in hints if name in hint})
            raise ConfigError(f"config.{seen} is a value of type {' or '.join(kinds)}, which has no fields")
    return found


def _dataclasses(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) is typing.Annotated:
        return _dataclasses(hint.__origin__)  # `get_args` also returns the limit, itself a dataclass
    return [found for part in typing.get_args(hint) for found in _dataclasses(part)]


def _docs(cls: Any) -> dict[str, str]:
    """Field names and their entries in the docstring's section "Attributes"."""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.M | re.S)
    docs: dict[str, str] = {}
    if section is None:
        return docs
    for entry in re.split(r"\n(?=  \S)", section[1].rstrip()):
        names, _, text = entry.strip().partition(":")
        docs |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return docs


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [str(limit) for limit in hint.__metadata__ if dataclasses.is_dataclass(limit)]
        return ", ".join([_type(arguments[0]), *limits])
    if origin is Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(member) for member in arguments)
    if hint is types.NoneType:
        return "None"
    if arguments:
        inner = ", ".join("..." if a is Ellipsis else _type(a) for a in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    name = getattr(hint, "__name__", str(hint))
    return f"your own {name}" if getattr(hint, "_is_protocol", False) else name


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}(...)"
    return repr(value)
