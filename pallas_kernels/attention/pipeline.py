"""Software pipelining within a kernel: the units of a block overlap, so that no unit of the chip waits."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["pipelined"]


def pipelined(
    units: Sequence[Any],
    produce: Callable[[Any], Any],
    transform: Callable[[Any, Any], Any],
    consume: Callable[[Any, Any], None],
    *,
    ahead: int = 1,
    lag: int = 1,
) -> None:
    """Three stages of every unit, written out so that different units' stages lie side by side.

    The compiler schedules within straight code; products of one unit fill the time of another's softmax.

    Args:
      produce: matrix products of a unit.
      transform: elementwise work on what they gave.
      consume: matrix products with the result, added up.
      ahead: how many units `produce` is ahead of `transform`.
      lag: how many units `consume` is behind it.
    """
    count = len(units)
    produced = {index: produce(units[index]) for index in range(min(ahead, count))}
    transformed = {}
    for index in range(count + lag):
        if index + ahead < count:
            produced[index + ahead] = produce(units[index + ahead])
        if index < count:
            transformed[index] = transform(units[index], produced.pop(index))
        if index >= lag:
            consume(units[index - lag], transformed.pop(index - lag))
