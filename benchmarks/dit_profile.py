"""CPU seconds of a training step of `dit_vs_diffusers.py` by kind of operation.

    python benchmarks/dit_profile.py [--preset small] [--remat dots]

Runs on one core, so that operations do not overlap, and reads XLA's trace, whose operation names are looked
up in the compiled program. For comparison, prints the total of diffusers' step on one core. Needs the
`parity` extra. The last line is one JSON object: seconds by kind and in total.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_xprof_traceme=true"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from dit_vs_diffusers import PRESETS, Diffusers, Vidgen, make_inputs, write

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"%?([\w.\-]+) \(.*\) -> .* \{")
_MOVES = {
    *(
        "parameter",
        "constant",
        "bitcast",
        "reshape",
        "copy",
        "transpose",
        "broadcast",
        "concatenate",
        "slice",
    ),
    *("dynamic-slice", "dynamic-update-slice", "pad"),
}
"""Opcodes that move data without computing."""
_CALLS = re.compile(r"calls=%?([\w.\-]+)")


def kinds(hlo: str) -> dict[str, str]:
    """Kind of each operation of a compiled program, by name; a fusion's kind follows from its parts."""
    opcodes = collections.defaultdict(set)
    operations: dict[str, tuple[str, str]] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcode = match.groups()
            opcodes[computation].add(opcode)
            called = _CALLS.search(line)
            operations[name] = (opcode, called[1] if called else "")

    def kind(opcode: str, called: str) -> str:
        inside = opcodes[called] if called else {opcode}
        if "dot" in inside:
            return "products"
        if "reduce" in inside:
            return "sums"
        return "elementwise" if inside - _MOVES else "copies"

    return {name: kind(*operation) for name, operation in operations.items()}


def profile(vidgen: Vidgen) -> dict[str, float]:
    """Seconds by kind: the time of each operation without operations nested in it."""
    import jax

    run = vidgen.calls()["train_step"]
    state = vidgen.optimizer.init(vidgen.params)
    known = kinds(vidgen.train_step.lower(vidgen.params, state, vidgen.inputs).compile().as_text() or "")
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        trace = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    seconds: collections.Counter[str] = collections.Counter()
    for line in (line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")):
        events = [(e.start_ns, -e.duration_ns, e.name) for e in line.events if "wait" not in e.name]
        stack: list[tuple[float, str]] = []
        for start, duration, name in sorted(events):
            while stack and stack[-1][0] <= start:
                stack.pop()
            if stack:
                seconds[stack[-1][1]] += duration / 1e9
            kind = known.get(name, "loops and scheduling")
            kind = "loops and scheduling" if name.startswith(("while", "call", "conditional")) else kind
            seconds[kind] -= duration / 1e9
            stack.append((start - duration, kind))
    return dict(seconds.most_common(), total=sum(seconds.values()))


def main() -> None:
    """Prints the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    arguments = parser.parse_args()
    size = PRESETS[arguments.preset]
    inputs = make_inputs(size)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, size)
        diffusers = Diffusers(folder, inputs, "cpu", threads=1)
        vidgen = Vidgen(folder, inputs, "cpu", arguments.remat)
    result = {
        "preset": arguments.preset,
        "remat": arguments.remat,
        "vidgen": profile(vidgen),
        "diffusers_total": _seconds(diffusers.calls(compiled=False)["train_step"]),
    }
    print(json.dumps(result))


def _seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
