"""Values of config.json files of other programs, each checked where it is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vidgen.ckpt.tensor_files import WeightsError
from vidgen.core.errors import UserError
from vidgen.core.limits import Limit

__all__ = ["ConfigValues", "check_size"]

T = TypeVar("T")

_REQUIRED: Any = object()
_MARGIN = 4
"""Of a model that is a little too large, the tensors that are missing say more."""


class ConfigValues:
    """The values of a config; each error names the file and the key.

    Attributes:
      values: of the file.
      where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def number(self, key: str, limit: Limit, default: Any = _REQUIRED) -> Any:
        """A number in the range of `limit`.

        Args:
          default: for a key that is missing or null; where none is given the key must be there.

        Raises:
          UserError: it is missing, no number or out of range.
        """
        value = self._value(key, default)
        if value is None and default is None:
            return None
        return limit.check(value, f"{self.where}: {key}")

    def numbers(self, key: str, limit: Limit, lengths: Sequence[int]) -> tuple[Any, ...]:
        """Numbers in the range of `limit`, as many as `lengths` allows.

        Raises:
          UserError: it is missing, no list of such numbers or of another length.
        """
        return tuple(limit.check(item, f"{self.where}: {key}") for item in self._list(key, lengths))

    def flags(self, key: str, lengths: Sequence[int]) -> tuple[bool, ...]:
        """As `numbers`, true or false each."""
        found = self._list(key, lengths)
        if not all(isinstance(item, bool) for item in found):
            raise self._wrong(key, found, "a list of true and false")
        return tuple(found)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is missing or null.

        Raises:
          UserError: it is something else.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of `choices`; `default` where the key is missing or null.

        Raises:
          UserError: it is missing, or something else.
        """
        value = self._value(key, default)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        expected = " or ".join(map(repr, choices))
        raise self._wrong(key, value, expected, "is not supported; ")

    def make(self, cls: Callable[..., T], **options: Any) -> T:
        """`cls(**options)`, whose errors name the file.

        Raises:
          UserError: the options do not go together.
        """
        try:
            return cls(**options)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

    def _list(self, key: str, lengths: Sequence[int]) -> list[Any]:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, list) or len(value) not in lengths:
            low, high = min(lengths), max(lengths)
            raise self._wrong(key, value, f"a list of {low if low == high else f'{low} to {high}'} values")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is not _REQUIRED:
            return default
        kind = "is null" if key in self.values else "is missing"
        raise UserError(f"{self.where}: {key} {kind}: take the file from where the weights are from")

    def _wrong(self, key: str, value: Any, expected: str, found: str = "") -> UserError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UserError(f"{self.where}: {key}={shown} {found}expected {expected}".replace("  ", " "))


def check_size(needed: int, shapes: Mapping[str, Sequence[int]], *, config: str, weights: str) -> None:
    """Refuses a model that is far larger than all tensors of its weights together, before it is built.

    Args:
      needed: a lower bound of the numbers that the model's arrays hold.
      shapes: of the tensors.

    Raises:
      WeightsError: names both files.
    """
    there = sum(math.prod(shape) for shape in shapes.values())
    if needed > _MARGIN * there:
        raise WeightsError(
            f"{config} describes a model of {needed:,} numbers or more, {weights} holds {there:,}: they do "
            "not belong together"
        )
