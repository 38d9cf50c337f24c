"""Reader of a compiled program's text: operations, their run counts, and the evaluator's cycles."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

__all__ = ["Branch", "Instruction", "instructions", "stored_bytes"]

Branch = Literal["most", "least"]
"""The branch that a program takes at a conditional: with the most or least bytes read and written."""

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_EVALUATED = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_SCOPED = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_SIZE = re.compile(r'"size":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))")
_ARRAY = re.compile(
    r"(?P<dtype>[a-z]+(?P<bits>\d*)\w*)\[(?P<sizes>[\d,]*)\]"
    r"(?:\{(?P<order>[\d,]*)(?::T\((?P<tile>[\d,]+)\))?)?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """An operation that takes time.

    Attributes:
      name, opcode: name and opcode in the compiled program.
      kernel: whether the operation is a Pallas kernel.
      count: number of runs in the program; a loop with unknown trip count counts once, and operations in
        branches that are not taken count 0.
      evaluated: cycles that libtpu's evaluator simulated, None if it did not run.
      traffic: bytes read and written, in the layout in memory (with padding).
      scoped_bytes: bytes of scoped VMEM.
    """

    name: str
    opcode: str
    kernel: bool
    count: int
    evaluated: int | None
    traffic: int
    scoped_bytes: int


def instructions(text: str, branch: Branch = "most") -> list[Instruction]:
    """Operations in `compiled.as_text()` that the entry runs, with those in loops, calls and conditionals.

    Leaves out operations that run in parallel with others: asynchronous copies, and SparseCore operations.
    """
    computations, entry = _computations(text)
    return list(_reached(computations, entry, 1, branch)) if entry else []


def stored_bytes(type_: str) -> int:
    """Bytes of the arrays in an HLO type, padded to the tiles of their layout.

    For instance, `bf16[2,8192,64]{2,1,0:T(8,128)(2,1)}` stores its minor dimension of 64 as 128.
    """
    total = 0
    for match in _ARRAY.finditer(type_):
        sizes = [int(size) for size in match["sizes"].split(",") if size]
        order = [int(axis) for axis in (match["order"] or "").split(",") if axis]
        tile = [int(size) for size in (match["tile"] or "").split(",") if size]
        for axis, multiple in zip(order, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // multiple) * multiple
        total += math.prod(sizes) * max(8, int(match["bits"] or 8)) // 8
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions by computation, one string each, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and current is None:
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            # A SparseCore's computation has text after the brace; two braces close multi-line attributes.
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.append(line)
        elif current:
            current[-1] += line  # Multi-line attributes.
    return computations, entry


def _reached(
    computations: Mapping[str, list[str]], name: str, count: int, branch: Branch
) -> Iterator[Instruction]:
    types: dict[str, str] = {}
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        assert match is not None  # As in _computations.
        types[match["name"]] = match["type"]
        found = _read(line, match, types, count)
        if found is not None:
            yield found
        if match["opcode"] in ("while", "call"):
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                yield from _reached(computations, called, count * (int(trips[1]) if trips else 1), branch)
        if match["opcode"] == "conditional":
            named = [name for both in _BRANCHES.finditer(line) for name in (both[1] or both[2]).split(",")]
            found = [list(_reached(computations, name.strip().lstrip("%"), count, branch)) for name in named]
            traffic = [sum(inner.count * inner.traffic for inner in inners) for inners in found]
            taken = traffic.index(max(traffic) if branch == "most" else min(traffic))
            for index, inners in enumerate(found):
                yield from (
                    inner if index == taken else dataclasses.replace(inner, count=0) for inner in inners
                )


def _read(line: str, match: re.Match[str], types: Mapping[str, str], count: int) -> Instruction | None:
    """The operation, or None if it takes no time itself: parameters, bitcasts, tuples, and while loops."""
    kernel = match["opcode"] == "custom-call" and 'custom_call_target="tpu_custom_call"' in line
    if not kernel and '"estimated_cycles"' not in line:
        return None
    evaluated, scoped = _EVALUATED.search(line), _SCOPED.search(line)
    operands = re.findall(r"%([\w.-]+)", match["operands"])
    return Instruction(
        name=match["name"],
        opcode=match["opcode"],
        kernel=kernel,
        count=count,
        # The evaluator reports zero for loops that it cannot analyse.
        evaluated=int(evaluated[1]) or None if evaluated else None,
        traffic=stored_bytes(match["type"]) + sum(stored_bytes(types.get(name, "")) for name in operands),
        scoped_bytes=sum(map(int, _SIZE.findall(scoped[1]))) if scoped else 0,
    )
