"""Tunes the block sizes in `block_sizes.json` by static cycle counts; needs libtpu, but no TPU.

    python -m vidgen.pallas_kernels.attention.tune --generation v6e [--pass forward] [--head-dim 128]
        [--masked | --no-masked] [--limit 300] [--write]

Compiles every candidate and prints its cycles per tile by the stall model, which runs for all generations
(`tpu_static`). `--write` stores the best of each pass, head dimension and kind (masked or not) in the table.
Sizes for masks are tuned on a packed row of equal segments of one block each, with blocks of 1024 tokens:
smaller blocks skip more hidden pairs, larger ones cost less where everything is visible. Half of the blocks
count as if a segment boundary were inside. Candidates that take libtpu longer than `--limit` seconds to
compile are skipped, because users wait for that too. Takes half an hour or more per generation, several times
that for tpu7x.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

from ..tpu_static import attention
from ..tpu_static.attention import PASSES, Shape
from ..tpu_static.interior import Choice
from ..tpu_static.measure import Job, measure
from . import specs
from .specs import GENERATIONS, BlockSizes

__all__ = ["candidates", "main", "tune"]

HEAD_DIMS = (64, 128, 256)
TABLE = pathlib.Path(specs.__file__).with_name("block_sizes.json")
_PAIRS = {
    "forward": [(2048, 2048), (4096, 2048)],
    "backward": [(1024, 1024), (2048, 1024), (2048, 2048)],
}
"""Queries and keys of a block without a mask."""
_AT_ONCE = {64: (4, 2), 128: (4, 2), 256: (2,)}
"""Heads, or pairs of heads with 64 channels, per block under a mask, by head dimension."""
BODIES: tuple[Literal["fewest", "most"], ...] = ("fewest", "most")
"""A kernel's bodies, as `Choice.take`: for fully visible blocks, and for partly visible ones."""


def candidates(which: specs.Pass, *, head_dim: int, masked: bool) -> Iterator[BlockSizes]:
    """Block sizes worth trying; their scores per block are limited so that the program compiles."""
    pairs = [(1024, 1024)] if masked or head_dim == 256 else _PAIRS[which]
    units = [(256, 256), (512, 256)]
    depths = [(1, 1), (2, 2), (4, 2)]
    if which == "backward":
        units, depths = [*units, (512, 512)], [(1, 1)]
    at_once = _AT_ONCE[head_dim] if masked else (1,)
    for block, unit, depth, heads in itertools.product(pairs, units, depths, at_once):
        yield BlockSizes(
            queries=block[0],
            keys=block[1],
            query_unit=unit[0],
            key_unit=unit[1],
            ahead=depth[0],
            lag=depth[1],
            heads=heads,
        )


def build(*, which: str, sizes: dict[str, int], **shape: Any) -> tuple[Any, Sequence[Any]]:
    """A pass with these block sizes, and its arguments: the `build` of a `Job`."""
    return getattr(attention, which)(**shape, blocks=BlockSizes(**sizes))


def tune(
    generation: str, which: specs.Pass, *, head_dim: int, masked: bool, limit: float = 300.0
) -> tuple[BlockSizes, float]:
    """The best candidate and its cycles per tile of 1024 x 1024; prints every candidate.

    Args:
      limit: most seconds for one compilation.

    Raises:
      RuntimeError: no candidate compiles.
    """
    tried, jobs, tiles = list(candidates(which, head_dim=head_dim, masked=masked)), [], []
    for sizes in tried:
        shape = Shape(head_dim=head_dim)
        if masked:
            shape = Shape(head_dim=head_dim, heads=shape.heads * sizes.heads, segments=8)
        keywords = {"generation": generation, "which": which, "sizes": dataclasses.asdict(sizes)}
        hints = shape.hints(generation, sizes)
        # A kernel with masks has two bodies; the one that compares codes does slightly more work.
        for take in BODIES if masked else BODIES[:1]:
            jobs.append(
                Job(
                    build="vidgen.pallas_kernels.attention.tune:build",
                    keywords=keywords | dataclasses.asdict(shape),
                    hints={
                        name: dataclasses.replace(
                            hint, choice=Choice(take=take), end=hint.end if take == "fewest" else None
                        )
                        for name, hint in hints.items()
                    },
                    branch="least",
                )
            )
        tiles.append(shape.tiles)
    found = []
    reports = iter(measure(jobs, generation=generation, evaluate=False, limit=limit))
    for sizes, size in zip(tried, tiles, strict=True):
        measured = [next(reports) for _ in (BODIES if masked else BODIES[:1])]
        failure = " ".join(report.failure for report in measured).strip()
        if failure:
            print(f"{sizes}: {failure}", flush=True)
            continue
        each = [cast(int, report.kernel_cycles("stall model")) / size for report in measured]
        print(f"{sizes}: {', '.join(str(round(cycles, 1)) for cycles in each)}", flush=True)
        found.append((sum(each) / len(each), sizes))
    if not found:
        raise RuntimeError(f"tune: no candidate compiles for {generation}, {which}, head dim {head_dim}")
    cycles, best = min(found, key=lambda pair: pair[0])
    return best, cycles


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes and prints the best sizes, the last line as one JSON object; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", choices=list(GENERATIONS), required=True)
    parser.add_argument("--pass", dest="which", choices=PASSES, help="default: both")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, help="default: all")
    parser.add_argument("--masked", action=argparse.BooleanOptionalAction, help="default: both")
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds for one compilation")
    parser.add_argument("--write", action="store_true", help=f"write the best sizes into {TABLE.name}")
    options = parser.parse_args(argv)
    result = {}
    for which, head_dim, masked in itertools.product(
        PASSES if options.which is None else [options.which],
        HEAD_DIMS if options.head_dim is None else [options.head_dim],
        (False, True) if options.masked is None else [options.masked],
    ):
        name = specs.entry(head_dim, 16, masked)
        print(f"{options.generation} {which} {name}", flush=True)
        best, cycles = tune(options.generation, which, head_dim=head_dim, masked=masked, limit=options.limit)
        result[f"{which} {name}"] = {"cycles": round(cycles, 1), **dataclasses.asdict(best)}
        if options.write:
            table = json.loads(TABLE.read_text())
            table[options.generation][which][name] = dataclasses.asdict(best)
            TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
