"""Values from other programs' config.json files, validated on access."""

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
"""Below this factor the list of missing tensors is the better error."""


class ConfigValues:
    """Values of a config; each error names the file and the key.

    Attributes:
      values: contents of the file.
      where: path of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def number(self, key: str, limit: Limit, default: Any = _REQUIRED) -> Any:
        """Number in the range of `limit`.

        Args:
          default: value for a key that is missing or null; without it the key is required.

        Raises:
          UserError: the value is missing, not a number or out of range.
        """
        value = self._value(key, default)
        if value is None and default is None:
            return None
        return limit.check(value, f"{self.where}: {key}")

    def numbers(self, key: str, limit: Limit, lengths: Sequence[int]) -> tuple[Any, ...]:
        """Numbers in the range of `limit`, with a count in `lengths`.

        Raises:
          UserError: the value is missing, not a list of such numbers or of another length.
        """
        return tuple(limit.check(item, f"{self.where}: {key}") for item in self._list(key, lengths))

    def flags(self, key: str, lengths: Sequence[int]) -> tuple[bool, ...]:
        """Booleans, with a count in `lengths`; raises as `numbers` does."""
        found = self._list(key, lengths)
        if not all(isinstance(item, bool) for item in found):
            raise self._wrong(key, found, "a list of true and false")
        return tuple(found)

    def flag(self, key: str, default: bool) -> bool:
        """Boolean; `default` if the key is missing or null.

        Raises:
          UserError: the value is not a boolean.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of `choices`; `default` if the key is missing or null.

        Raises:
          UserError: the value is missing or not one of `choices`.
        """
        value = self._value(key, default)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        expected = " or ".join(map(repr, choices))
        raise self._wrong(key, value, expected, "is not supported; ")

    def make(self, cls: Callable[..., T], **options: Any) -> T:
        """Returns `cls(**options)`; its errors name the file.

        Raises:
          UserError: `cls` rejects the options.
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
        raise UserError(f"{self.where}: {key} {kind}: use the config.json that belongs to the weights")

    def _wrong(self, key: str, value: Any, expected: str, found: str = "") -> UserError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UserError(f"{self.where}: {key}={shown} {found}expected {expected}".replace("  ", " "))


def check_size(needed: int, shapes: Mapping[str, Sequence[int]], *, config: str, weights: str) -> None:
    """Rejects a model far larger than all tensors of its weights together, before it is built.

    Args:
      needed: lower bound of the number of elements in the model's arrays.
      shapes: shapes of the tensors.

    Raises:
      WeightsError: names both files.
    """
    available = sum(math.prod(shape) for shape in shapes.values())
    if needed > _MARGIN * available:
        raise WeightsError(
            f"{config} describes a model of {needed:,} numbers or more, {weights} holds {available:,}: "
            "they do not belong together"
        )
