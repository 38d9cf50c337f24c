"""Static cycle counts of a jitted function on a TPU, from the compiler's (libtpu's) output, without a TPU.

    job = Job(build="vidgen.pallas_kernels.tpu_static.attention:forward", keywords={"generation": "v6e"})
    [report] = measure([job], generation="v6e")

Sources of the figures, most trusted first:

1. libtpu's evaluator, which simulates an operation's bundles with its loops, stalls and DMAs. The compiled
   program holds its result for every operation, kernels and others. The evaluator has no data: memory that a
   kernel branches on reads as zero, so that it may skip a kernel's body (jax's splash attention); a figure
   far below the stall model's is not used. It does not run every kernel: libtpu 0.0.42 fails on kernels with
   a grid for tpu7x, and on bfloat16 vector arithmetic for v6e; 0.0.50 runs more.
2. The stall model (`stalls.py`) of an interior step of a kernel, times the steps of its grid.
3. For other operations where the evaluator did not run or reports nothing: the bytes read and written over
   the bandwidth of HBM. Where the evaluator does run, it mostly finds 1 to 2 times as much. (XLA's cost model
   for fusion decisions gives 1.7 to 4 times the evaluator's cycles, and is not used.)

These are schedules, not measured times: nothing competes for HBM, and clocks are unknown. Arguments are in
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
    """This machine cannot measure anything; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One function to measure.

    Attributes:
      build: `module:function` or `path/to/file.py:function`; called with `keywords`, it returns the function
        and a sequence of its arguments as `jax.ShapeDtypeStruct`.
      keywords: arguments of `build`, serializable as JSON.
      hints: hints by a regular expression for a kernel's full name; the first match applies.
      branch: the branch that the program takes at a conditional such as `lax.cond`.
    """

    build: str
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hints: Mapping[str, Hint] = dataclasses.field(default_factory=dict)
    branch: Branch = "most"


def measure(
    jobs: Sequence[Job], *, generation: str, evaluate: bool = True, limit: float = 900.0
) -> list[Report]:
    """Reports of the jobs, each compiled for one core of a TPU generation; no TPU is needed.

    All jobs share a process. A job that crashes it, or exceeds the limit, is compiled again without the
    evaluator; if that fails too, its report holds the failure, and the other jobs continue.

    Args:
      jobs: functions to compile.
      generation: a key of `GENERATIONS`.
      evaluate: runs libtpu's evaluator, whose time and memory grow with the number of issued bundles: minutes
        and gigabytes for ten million.
      limit: most seconds for one compilation.

    Raises:
      MeasureError: libtpu is not installed, the generation is unknown, or the worker does not start.
    """
    if generation not in GENERATIONS:
        raise MeasureError(f"generation {generation}: expected one of {', '.join(GENERATIONS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise MeasureError(
            'libtpu, the compiler for TPUs, is not installed: pip install "jax[tpu]" (x86-64 Linux)'
        )
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as name:
        directory = pathlib.Path(name)
        pending, unevaluated = list(range(len(jobs))), {}
        if evaluate:
            unevaluated = _compile(directory, jobs, pending, generation, True, limit)
            pending = list(unevaluated)
        failures = _compile(directory, jobs, pending, generation, False, limit)
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
    """Runs workers until each job has been tried; returns why jobs crashed their worker, by index."""
    pending, deaths = list(indices), {}
    log = directory / "log"
    while pending:
        plan = {
            "topology": GENERATIONS[generation].topology,
            "limit": limit,
            "jobs": [
                {"index": index, "build": jobs[index].build, "keywords": dict(jobs[index].keywords)}
                for index in pending
            ],
        }
        (directory / "jobs.json").write_text(json.dumps(plan))
        for index in pending:
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
        begun = [index for index in pending if (directory / str(index)).exists()]
        if not begun:
            raise MeasureError(f"the compiling process did not start:\n{log.read_text()[-2000:]}")
        deaths[begun[-1]] = _cause(status, log.read_text(), limit)
        pending = pending[pending.index(begun[-1]) + 1 :]
    return deaths


def _cause(status: int, log: str, limit: float) -> str:
    """One line that says why a worker died."""
    if status == -signal.SIGALRM:
        return f"took longer than {limit:.0f} s"
    fatal = re.search(r"^(?:F\d{4} \S+ +\d+ |\*\*\* )(.*)$", log, flags=re.MULTILINE)
    return f"the compiler died with status {status}" + (f": {fatal[1][:300]}" if fatal else "")
