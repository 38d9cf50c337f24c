"""Runs workers, and ends those that hang: what they read, and how each reading ended."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence

__all__ = ["Limits", "Report", "reproduce", "run"]

START_SECONDS = 400
"""Until a worker has imported what it reads with, and made the valid files; on a loaded machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one reading.

    Attributes:
      cpu_seconds: of all threads; the worker ends the reading.
      wall_seconds: the worker is ended, where a C library lets no signal through.
      peak_bytes: by which it may raise the memory of the process.
    """

    cpu_seconds: float = 10
    wall_seconds: float = 60
    peak_bytes: int = 1 << 30


Part = tuple[str, int, int]
"""Name of a target, or "*" for each of them; index of the first input; number of inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How the readings ended.

    Attributes:
      results: as `worker.Worker.run` gives them, in order; of one that ended its worker too.
      seconds: in all.
    """

    results: tuple[dict, ...]
    seconds: float

    @property
    def failures(self) -> list[dict]:
        return [result for result in self.results if result["outcome"] == "failure"]

    def counts(self) -> dict[str, collections.Counter]:
        """Readings by target and outcome."""
        table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        for result in self.results:
            table[result["target"]][result["outcome"]] += 1
        return dict(table)

    def summary(self) -> str:
        """A line for each target, and what the whole took."""
        lines = [
            f"{name:16} {sum(counts.values()):5}  "
            + ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items()))
            for name, counts in self.counts().items()
        ]
        slowest = max(self.results, key=lambda result: result["seconds"])
        peak = max(result["peak"] for result in self.results)
        return "\n".join(
            [
                *lines,
                f"{len(self.results)} inputs in {self.seconds:.0f} s; the slowest, {slowest['target']}:"
                f"{slowest['index']}, took {slowest['seconds']:.1f} s; memory grew by {peak >> 20} MiB",
            ]
        )


def run(
    plan: Sequence[Part],
    root: pathlib.Path,
    *,
    seed: int = 0,
    module: str = "tests.fuzz.targets",
    limits: Limits = Limits(),
    without: Collection[str] = (),
) -> Report:
    """Reads the inputs of a plan, in order, in as many workers as it takes.

    Args:
      root: an empty folder to work in.
      module: has `TARGETS`.
      without: targets that "*" does not stand for.
    """
    started, results, number = time.monotonic(), [], 0
    rest = list(plan)
    while rest:
        found, rest = _worker(rest, root / str(number), seed, module, limits, without)
        results += found
        number += 1
    return Report(results=tuple(results), seconds=time.monotonic() - started)


def reproduce(result: dict, seed: int, module: str = "tests.fuzz.targets") -> str:
    """The command that reads one input again."""
    options = "" if seed == 0 else f" --seed {seed}"
    options += "" if module == "tests.fuzz.targets" else f" --module {module}"
    return (
        f"python -m tests.fuzz.worker --root /tmp/fuzz --keep{options} {result['target']}:{result['index']}:1"
    )


def _worker(
    plan: list[Part], root: pathlib.Path, seed: int, module: str, limits: Limits, without: Collection[str]
) -> tuple[list[dict], list[Part]]:
    """The results of one worker, and what is left of the plan where it ended early."""
    root.mkdir(parents=True)
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.worker", "--root", str(root / "work")]
    command += ["--seed", str(seed), "--module", module]
    command += ["--cpu-seconds", str(limits.cpu_seconds), "--peak-bytes", str(limits.peak_bytes)]
    results: list[dict] = []
    command += [f"--without={name}" for name in without]
    command += [f"{name}:{first}:{count}" for name, first, count in plan]
    with (
        (root / "stderr").open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True) as process,
    ):
        try:
            plan, started, why = _follow(process, results, limits.wall_seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if why is None:
        return results, []
    said = (root / "stderr").read_text(errors="replace")[-3000:]
    if started is None:
        raise RuntimeError(f"the worker ended before the first input ({why}):\n{said}")
    name, index = started
    results.append(
        {
            "target": name,
            "index": index,
            "file": "",
            "outcome": "failure",
            "error": f"{why}\n{said}",
            "seconds": 0.0,
            "peak": 0,
        }
    )
    return results, _after(plan, name, index)


def _follow(
    process: subprocess.Popen, results: list[dict], wall_seconds: float
) -> tuple[list[Part], tuple[str, int] | None, str | None]:
    """Takes the results of a worker until it ends: its plan, the input that it ended in, and why."""
    assert process.stdout is not None
    limit, plan, started, buffer = START_SECONDS, [], None, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(limit):
                os.killpg(process.pid, signal.SIGABRT)  # faulthandler says where it was.
                with contextlib.suppress(subprocess.TimeoutExpired):  # Then the caller ends it.
                    process.wait(10)
                return plan, started, f"no answer for {limit} s"
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in map(json.loads, lines):
                if "plan" in line:
                    plan = [(name, first, count) for name, first, count in line["plan"]]
                elif "started" in line:
                    limit = wall_seconds
                    started = tuple(line["started"])
                elif "outcome" in line:
                    results.append(line)
                    started = None
    status = process.wait()
    return plan, started, None if status == 0 else f"the worker ended with status {status}"


def _after(plan: list[Part], name: str, index: int) -> list[Part]:
    """What comes after an input in a plan."""
    at = next(n for n, part in enumerate(plan) if part[0] == name and part[1] <= index < part[1] + part[2])
    _, first, count = plan[at]
    left = first + count - index - 1
    return [*([(name, index + 1, left)] if left else []), *plan[at + 1 :]]
