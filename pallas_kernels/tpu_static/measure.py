"""Cycles of a jitted function on a TPU that is not there, from what its compiler, libtpu, knows of it.

    job = Job(build="vidgen.pallas_kernels.tpu_static.attention:forward", keywords={"generation": "v6e"})
    [report] = measure([job], generation="v6e")

Where figures come from, the most trusted first:

1. libtpu's evaluator, which simulates an operation's bundles with its loops, stalls and DMAs. The compiled
   program carries its result for each operation, kernels and all others alike. It sees no data: memory that a
   kernel branches on reads as zero, so that it may skip a kernel's body (jax's splash attention); a figure
   that is far below the stall model's is not used. It does not run every kernel: libtpu 0.0.42 fails on
   kernels with a grid for tpu7x, and on bfloat16 arithmetic of vectors for v6e; 0.0.50 runs more.
2. The stall model (`stalls.py`) of an interior step of a kernel, times the steps of its grid.
3. For other operations where the evaluator did not run, or reports nothing: the bytes that they read and
   write over the bandwidth of HBM. Where it does run, it mostly finds 1 to 2 times as much. (XLA's cost
   model, by which it chooses fusions, says 1.7 to 4 times the evaluator's cycles, and is not used.)

All of it is a schedule and no stopwatch: nothing competes for HBM, and clocks are not known. Arguments lie in
HBM. Differences under 3 to 5 % mean nothing.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from . import worker
from .generations import GENERATIONS
from .program import Branch
from .report import Hint, Report, read_report

__all__ = ["Job", "MeasureError", "measure"]


class MeasureError(RuntimeError):
    """Nothing can be measured here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One function to measure.

    Attributes:
      build: `module:function` or `path/to/file.py:function`; called with `keywords`, it returns the function
        and a sequence of its arguments as `jax.ShapeDtypeStruct`.
      keywords: what JSON can hold.
      hints: by a regular expression that a kernel's whole name matches; the first counts.
      branch: which branch the program takes where it has several, as `lax.cond`.
    """

    build: str
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hints: Mapping[str, Hint] = dataclasses.field(default_factory=dict)
    branch: Branch = "most"


def measure(
    jobs: Sequence[Job], *, generation: str, evaluate: bool = True, limit: float = 900.0
) -> list[Report]:
    """Compiles each job for one core of a generation and reads the result; no TPU is needed.

    All jobs share a process. One that takes it down, or longer than it may, is compiled again without the
    evaluator; if that fails too, its report says so, and the others go on.

    Args:
      jobs: what to compile.
      generation: of `GENERATIONS`.
      evaluate: run libtpu's evaluator, whose time and memory grow with all bundles that a program issues:
        some minutes and gigabytes for ten million.
      limit: seconds for one compilation.

    Raises:
      MeasureError: libtpu is not installed, or the generation is not known, or the worker does not start.
    """
    if generation not in GENERATIONS:
        raise MeasureError(f"generation {generation}: expected one of {', '.join(GENERATIONS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise MeasureError(
            'libtpu, the compiler for TPUs, is not installed: pip install "jax[tpu]" (x86-64 Linux)'
        )
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as name:
        directory = pathlib.Path(name)
        left, unevaluated = list(range(len(jobs))), {}
        if evaluate:
            unevaluated = _compile(directory, jobs, left, generation, True, limit)
            left = list(unevaluated)
        failures = _compile(directory, jobs, left, generation, False, limit)
        reports = []
        for index, job in enumerate(jobs):
            read = (
                Report(failure=failures[index])
                if index in failures
                else read_report(directory / str(index), job.hints, job.branch, generation)
            )
            reports.append(dataclasses.replace(read, unevaluated=unevaluated.get(index, "")))
        return reports


def _compile(
    directory: pathlib.Path,
    jobs: Sequence[Job],
    indices: Sequence[int],
    generation: str,
    evaluate: bool,
    limit: float,
) -> dict[int, str]:
    """Runs workers until each job has been tried; why some took their worker down, by index."""
    left, deaths = list(indices), {}
    log = directory / "log"
    while left:
        plan = {
            "topology": GENERATIONS[generation].topology,
            "limit": limit,
            "jobs": [
                {"index": index, "build": jobs[index].build, "keywords": dict(jobs[index].keywords)}
                for index in left
            ],
        }
        (directory / "jobs.json").write_text(json.dumps(plan))
        for index in left:
            shutil.rmtree(directory / str(index), ignore_errors=True)
        with log.open("w") as output:
            status = subprocess.run(
                [sys.executable, "-m", worker.__name__, str(directory)],
                env=worker.environment(directory, evaluate=evaluate),
                stdout=output,
                stderr=output,
                check=False,
            ).returncode
        if status == 0:
            break
        begun = [index for index in left if (directory / str(index)).exists()]
        if not begun:
            raise MeasureError(f"the compiling process did not start:\n{log.read_text()[-2000:]}")
        deaths[begun[-1]] = _cause(status, log.read_text(), limit)
        left = left[left.index(begun[-1]) + 1 :]
    return deaths


def _cause(status: int, log: str, limit: float) -> str:
    """Why a worker died, in one line."""
    if status == -signal.SIGALRM:
        return f"took longer than {limit:.0f} s"
    fatal = re.search(r"^(?:F\d{4} \S+ +\d+ |\*\*\* )(.*)$", log, flags=re.MULTILINE)
    return f"the compiler died with status {status}" + (f": {fatal[1][:300]}" if fatal else "")
