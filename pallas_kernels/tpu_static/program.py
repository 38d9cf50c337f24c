"""Reader of a compiled program's text: operations, how often they run, the evaluator's cycles."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

__all__ = ["Branch", "Instruction", "instructions", "stored_bytes"]

Branch = Literal["most", "least"]
"""Which branch of a conditional a program takes: by the bytes that its operations read and write."""

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
      name, opcode: in the compiled program.
      kernel: whether it is a Pallas kernel.
      count: how often the program runs it; a loop whose trips the compiler does not know counts once, and
        what lies in the other branches of a conditional not at all.
      evaluated: cycles that libtpu's evaluator simulated, if it ran.
      traffic: bytes that it reads and writes, as they lie in memory.
      scoped_bytes: of VMEM while it runs.
    """

    name: str
    opcode: str
    kernel: bool
    count: int
    evaluated: int | None
    traffic: int
    scoped_bytes: int


def instructions(text: str, branch: Branch = "most") -> list[Instruction]:
    """Of `compiled.as_text()`: what the entry runs, and what loops, calls and conditionals in it run.

    What runs beside other operations is left out: copies in the background, and what SparseCores do.
    """
    computations, entry = _computations(text)
    return list(_reached(computations, entry, 1, branch)) if entry else []


def stored_bytes(type_: str) -> int:
    """Bytes of the arrays that a type names, padded to the tiles of their layout.

    For instance `bf16[2,8192,64]{2,1,0:T(8,128)(2,1)}`, whose rows of 64 are stored as rows of 128.
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
    """Instructions by computation, each in one string, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and current is None:
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            # Of a SparseCore's computation more follows; two braces close attributes with line breaks.
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.append(line)
        elif current:
            current[-1] += line  # Attributes with line breaks.
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
            traffic = [sum(own.count * own.traffic for own in own_branch) for own_branch in found]
            taken = traffic.index(max(traffic) if branch == "most" else min(traffic))
            for index, own_branch in enumerate(found):
                yield from (
                    own if index == taken else dataclasses.replace(own, count=0) for own in own_branch
                )


def _read(line: str, match: re.Match[str], types: Mapping[str, str], count: int) -> Instruction | None:
    """None for what takes no time: parameters, bitcasts, tuples, and the while that its body stands for."""
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
        # Zero is what the evaluator reports of loops that it does not see through.
        evaluated=int(evaluated[1]) or None if evaluated else None,
        traffic=stored_bytes(match["type"]) + sum(stored_bytes(types.get(name, "")) for name in operands),
        scoped_bytes=sum(map(int, _SIZE.findall(scoped[1]))) if scoped else 0,
    )
