"""Counts the collectives in a compiled program's HLO text."""

import collections
import re

__all__ = ["COLLECTIVES", "count_collectives"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf"^\s+(?:ROOT )?%?[\w.-]+ = .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(")


def count_collectives(hlo: str) -> dict[str, int]:
    """Number of collective instructions of each kind; an instruction inside a loop counts once.

    On TPU a reduce-scatter is a fused computation named all-reduce-scatter, with an all-reduce inside.
    """
    counts = collections.Counter()
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _OPERATION.match(line):
            scattered = match[1] == "all-reduce" and computation.startswith("all-reduce-scatter")
            counts["reduce-scatter" if scattered else match[1]] += 1
    return {name: counts[name] for name in COLLECTIVES}
