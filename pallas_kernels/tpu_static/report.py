"""Report of a compiled job's dumps: its kernels, XLA's operations around them, and the cycles of both."""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping

from .dumps import DumpError, Listing, read_listing
from .generations import GENERATIONS
from .interior import Choice, Interior, interior_step
from .program import Branch, Instruction, instructions
from .stalls import stall_cycles

__all__ = ["Hint", "Kernel", "Operation", "Report", "read_report"]

_PLAUSIBLE = 0.8
"""Fraction of the stall model's cycles below which the evaluator must have skipped a part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hint:
    """Facts about a kernel that are not in its dumps.

    Attributes:
      steps: number of grid steps that do the work of an interior step; by default all.
      rows: number of rows of steps (outer blocks), each with a start and an end; by default not counted.
      choice: the branches that an interior step takes.
      end: the branches of a step that is both the first and the last of a row; by default `choice` with
        `Choice.ends`.
    """

    steps: int | None = None
    rows: int = 0
    choice: Choice = Choice()
    end: Choice | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel of the program.

    Attributes:
      instruction: the kernel call, with the evaluator's cycles for the kernel, and the bytes of scoped VMEM.
      interior: one interior step; `interior.bundles` is its length.
      stalled: cycles of the interior step with MXU stalls.
      steps: number of grid steps, None if unknown.
      ends: extra cycles of a step that is both the first and the last of a row, over an interior step.
      rows: number of rows of steps that count `ends`.
      use: slots that the interior step uses, by unit; VLOAD:FILL and VSTORE:SPILL are parts of VLOAD and
        VSTORE.
      least: cycles of the interior step if that unit were the only limit, by unit.
    """

    instruction: Instruction
    interior: Interior
    stalled: int
    steps: int | None
    ends: int = 0
    rows: int = 0
    use: Mapping[str, int]
    least: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The unit that needs the most cycles."""
        return max((unit for unit in self.least if ":" not in unit), key=lambda unit: self.least[unit])

    @property
    def modelled(self) -> int | None:
        """The stall model's cycles of the kernel, or None if its number of steps is unknown."""
        return None if self.steps is None else self.steps * self.stalled + self.rows * self.ends

    @property
    def evaluated(self) -> int | None:
        """The evaluator's cycles of the kernel, or None if it did not run or skipped a part."""
        cycles = self.instruction.evaluated
        skipped = cycles is not None and cycles < _PLAUSIBLE * (self.modelled or 0)
        return None if skipped else cycles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation that XLA adds around the kernels, e.g. a transpose.

    Attributes:
      instruction: the operation, with the evaluator's cycles if it ran.
      transfer: least cycles for its bytes from and to HBM.
    """

    instruction: Instruction
    transfer: int

    @property
    def cycles(self) -> int:
        """The evaluator's cycles, or else those of the transfer."""
        return self.instruction.evaluated or self.transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of measuring a job.

    Attributes:
      kernels: Pallas kernels in program order.
      operations: operations that XLA adds around the kernels.
      failure: why the job could not be measured, or empty.
      unevaluated: why the evaluator did not run, or empty.
    """

    kernels: tuple[Kernel, ...] = ()
    operations: tuple[Operation, ...] = ()
    failure: str = ""
    unevaluated: str = ""

    @property
    def method(self) -> str:
        """Source of `cycles`: "evaluator" if it ran all kernels, else "stall model"."""
        run = [kernel for kernel in self.kernels if kernel.instruction.count]
        return "evaluator" if all(kernel.evaluated for kernel in run) else "stall model"

    def kernel_cycles(self, method: str | None = None) -> int | None:
        """Cycles of all kernels by "evaluator", "stall model" or `self.method`; None if one is unknown."""
        evaluator = (method or self.method) == "evaluator"
        run = [kernel for kernel in self.kernels if kernel.instruction.count]
        cycles = [kernel.evaluated if evaluator else kernel.modelled for kernel in run]
        counts = [kernel.instruction.count for kernel in run]
        known = [count * each for count, each in zip(counts, cycles, strict=True) if each is not None]
        return sum(known) if len(known) == len(cycles) and not self.failure else None

    def operation_cycles(self) -> int:
        """Cycles of all other operations."""
        return sum(operation.instruction.count * operation.cycles for operation in self.operations)

    def cycles(self, method: str | None = None) -> int | None:
        """Cycles of the whole call; `method` as in `kernel_cycles`."""
        kernels = self.kernel_cycles(method)
        return None if kernels is None else kernels + self.operation_cycles()

    def without(self, kernel: str) -> "Report":
        """The report without kernels whose name, without its number, matches a regular expression."""
        remaining = [k for k in self.kernels if not re.fullmatch(kernel, _base(k.instruction.name))]
        return dataclasses.replace(self, kernels=tuple(remaining))


def read_report(folder: pathlib.Path, hints: Mapping[str, Hint], branch: Branch, generation: str) -> Report:
    """Reads the report of one job from a folder that the worker wrote.

    Args:
      folder: the program's text, the grids of its kernels, and libtpu's dumps, or an error.
      hints: hints by a regular expression for a kernel's full name; the first match applies.
      branch: the branch that the program takes at a conditional.
      generation: a key of `GENERATIONS`.
    """
    if (folder / "error").exists():
        return Report(failure=(folder / "error").read_text())
    timing = GENERATIONS[generation]
    grids: dict[str, set[int]] = collections.defaultdict(set)
    for name, steps in json.loads((folder / "grids.json").read_text()):
        grids[name].add(steps)
    kernels, operations = [], []
    try:
        for found in instructions((folder / "program.txt").read_text(), branch):
            if not found.kernel:
                transfer = round(found.traffic / timing.hbm_bytes)
                operations.append(Operation(instruction=found, transfer=transfer))
                continue
            base = _base(found.name)
            hint = next((hint for name, hint in hints.items() if re.fullmatch(name, base)), Hint())
            steps = hint.steps or _steps(base, grids)
            hint = dataclasses.replace(hint, steps=steps)
            kernels.append(_kernel(found, _listing(folder, found.name), hint, generation))
    except DumpError as error:
        return Report(failure=str(error))
    return Report(kernels=tuple(kernels), operations=tuple(operations))


def _kernel(instruction: Instruction, listing: Listing, hint: Hint, generation: str) -> Kernel:
    timing = GENERATIONS[generation]
    end = hint.end or dataclasses.replace(hint.choice, ends=True)
    interior, whole = (interior_step(listing, timing.delay_slots, choice) for choice in (hint.choice, end))
    stalled, with_ends = (stall_cycles(listing.bundles, step.spans, timing) for step in (interior, whole))
    use = interior.use(listing)
    slots = zip(listing.units, listing.capacity, strict=True)
    return Kernel(
        instruction=instruction,
        interior=interior,
        stalled=stalled,
        steps=hint.steps,
        ends=with_ends - stalled,
        rows=hint.rows,
        use=use,
        least={unit: use[unit] / capacity for unit, capacity in slots},
    )


def _listing(folder: pathlib.Path, name: str) -> Listing:
    """Dumps of a kernel, or of one whose name differs only in its number: equal kernels compile once."""
    dumps = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\d+-(.+))-\d+-final_bundles\.txt", path.name)
        if match:
            dumps[match[2]] = match[1]
    same = sorted(dump for dump in dumps if _base(dump) == _base(name))
    if not same:
        raise DumpError(f"kernel {name}: libtpu wrote no bundles; there are {sorted(dumps)}")
    prefix = dumps[name if name in dumps else same[0]]
    texts = []
    for kind in ("final_bundles", "final_hlo-static-per-bundle-utilization"):
        files = [
            path
            for path in folder.iterdir()
            if re.fullmatch(rf"{re.escape(prefix)}-\d+-{kind}\.txt", path.name)
        ]
        if not files:
            raise DumpError(f"kernel {name}: libtpu wrote no {prefix}-*-{kind}.txt")
        texts.append(files[0].read_text(errors="replace"))
    return read_listing(*texts)


def _steps(base: str, grids: Mapping[str, set[int]]) -> int | None:
    """Grid steps of the kernels named `base`, or of the only kernel; None if kernels of that name differ."""
    sizes = grids.get(base) or (next(iter(grids.values())) if len(grids) == 1 else set())
    return next(iter(sizes)) if len(sizes) == 1 else None


def _base(name: str) -> str:
    """A kernel's name without the number of the call."""
    return re.sub(r"(\.\d+)+$", "", name)
