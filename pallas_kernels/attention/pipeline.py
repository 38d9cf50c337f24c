"""Software pipelining within a kernel: the stages of a block's units overlap to keep the hardware busy."""

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
    """Runs three stages for each unit, unrolled so that stages of different units are adjacent.

    The compiler schedules within straight-line code: products of one unit overlap with another's softmax.

    Args:
      produce: matrix products of a unit.
      transform: elementwise operations on the result of `produce`.
      consume: matrix products with the result of `transform`, accumulated.
      ahead: number of units by which `produce` runs ahead of `transform`.
      lag: number of units by which `consume` runs behind `transform`.
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
