"""Prints static cycle counts of TPU kernels; no TPU is needed.

    python -m vidgen.pallas_kernels.tpu_static attention --generation v6e [--head-dim 64] [--sequence 32768]
        [--json]
    python -m vidgen.pallas_kernels.tpu_static attention --update

Cycles are per tile of 1024 queries by 1024 keys, on one core, for the whole jitted call. For a packed row
they are per visible tile and come from the stall model, because the evaluator has no segment ids. With --json
the last line is `{"v6e": {"forward": ..., "backward": ..., "method": ...}}`. `measure.py` describes the
methods.
"""

import argparse
import json
import sys

from . import attention
from .attention import PASSES, Shape
from .generations import GENERATIONS
from .measure import MeasureError
from .report import Kernel, Operation, Report

MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status, 1 if a pass could not be measured."""
    options = _parser().parse_args(arguments)
    try:
        if options.update:
            print(json.dumps(attention.update_table(options.limit), indent=2))
            return 0
        return _measure(options)
    except MeasureError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.pallas_kernels.tpu_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", choices=["attention"])
    parser.add_argument("--generation", choices=[*GENERATIONS, "all"], default="v6e")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--sequence", type=int, default=8192, help="the evaluator's time grows with its square"
    )
    parser.add_argument("--heads", type=int, default=0, help="default: as many as fill 128 lanes")
    parser.add_argument(
        "--segments", type=int, default=1, help="number of equal segments packed into the sequence"
    )
    parser.add_argument("--no-evaluator", action="store_true", help="use only the stall model, which is fast")
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds for one compilation")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--update", action="store_true", help=f"measure all generations and write {attention.TABLE.name}"
    )
    return parser


def _measure(options: argparse.Namespace) -> int:
    shape = Shape(
        sequence=options.sequence,
        head_dim=options.head_dim,
        heads=options.heads,
        segments=options.segments,
    )
    result, failed = {}, False
    for generation in GENERATIONS if options.generation == "all" else [options.generation]:
        reports = attention.measure_passes(
            shape, generation=generation, evaluate=not options.no_evaluator, limit=options.limit
        )
        rows = {name: attention.row(report, shape) for name, report in reports.items()}
        methods = {name: rows[name]["method"] for name in PASSES}
        same = len(set(methods.values())) == 1
        result[generation] = {name: rows[name]["cycles"] for name in PASSES} | {
            "method": methods[PASSES[0]] if same else ", ".join(f"{n}: {m}" for n, m in methods.items())
        }
        for name, report in reports.items():
            failed |= rows[name]["cycles"] is None
            if report.failure:
                print(f"{generation} {name}: {report.failure}", file=sys.stderr)
            elif not options.json:
                print(f"\n{generation} {name}: {rows[name]['cycles']:,} cycles per tile, {report.method}")
                print("\n".join(_lines(report, shape)))
    if options.json:
        print(json.dumps(result))
    return int(failed)


def _lines(report: Report, shape: Shape) -> list[str]:
    """Lines for the kernels with their interior steps and slots, and for XLA's operations around them."""
    lines = [f"  no evaluator: {report.unevaluated}"] if report.unevaluated else []
    for kernel in report.kernels:
        lines += _kernel_lines(kernel, shape)
    run = [operation for operation in report.operations if operation.instruction.count]
    others = len(report.operations) - len(run)
    lines += [_operation_line(operation, shape) for operation in run]
    return [*lines, f"  and {others} operations in branches that are not taken"] if others else lines


def _kernel_lines(kernel: Kernel, shape: Shape) -> list[str]:
    show = lambda cycles: "-" if cycles is None else f"{cycles / shape.tiles:,.1f}"  # noqa: E731
    units = sorted(kernel.least, key=lambda unit: -kernel.least[unit])
    step = kernel.interior.bundles
    name = kernel.instruction.name if kernel.instruction.count else f"{kernel.instruction.name} (not run)"
    lines = [
        f"  kernel {name}: evaluator {show(kernel.evaluated)}, stall model "
        f"{show(kernel.modelled)} per tile; VMEM {kernel.instruction.scoped_bytes / MIB:.1f} MiB",
        f"    step: {step:,} bundles, {kernel.stalled:,} cycles with stalls, {kernel.steps} steps; limit "
        f"{kernel.bottleneck}",
        "    slots: " + ", ".join(f"{unit} {kernel.least[unit] / max(step, 1):.0%}" for unit in units),
    ]
    for index, alternative in enumerate(kernel.interior.alternatives):
        lines.append(
            f"    alternative {index}: bundles {alternative.start:#x} to {alternative.stop:#x}, "
            f"{alternative.work:,} of work, {'taken' if alternative.taken else 'not taken'}"
        )
    return lines


def _operation_line(operation: Operation, shape: Shape) -> str:
    found = operation.instruction
    source = "evaluator" if found.evaluated else "transfer"
    times = f"{found.count} x " if found.count > 1 else ""
    return f"  {times}{found.opcode} {found.name}: {operation.cycles / shape.tiles:,.1f} per tile, {source}"


if __name__ == "__main__":
    sys.exit(main())
