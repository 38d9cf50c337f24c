"""Finds the block sizes of `block_sizes.json` by static cycles; no TPU is needed, but libtpu.

    python -m pallas_kernels.attention.tune --generation v6e --pass forward [--masked] [--write]

Every candidate is compiled and its cycles per tile are printed, by the stall model, which runs everywhere
(`pallas_kernels.tpu_static`); `--write` puts the best into the table. With `--masked`, which is for segments
and the like, only blocks of up to 1024 tokens are tried: smaller blocks leave out more of what is not seen.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pallas_kernels.attention import specs
from pallas_kernels.attention.specs import GENERATIONS, BlockSizes
from pallas_kernels.tpu_static.measure import Job, measure

__all__ = ["candidates", "main"]

_SEQUENCE = 8192
TABLE = pathlib.Path(specs.__file__).with_name("block_sizes.json")


def candidates(which: specs.Pass, *, head_dim: int, masked: bool) -> Iterator[BlockSizes]:
    """Sizes worth trying: at most so many scores per block that a program stays of a size that compiles."""
    pairs = (
        [(1024, 1024)] if masked else [(1024, 1024), (1024, 2048), (2048, 1024), (2048, 2048), (4096, 2048)]
    )
    units = ((256, 256), (512, 256), (512, 512), (1024, 512))
    for queries, keys in pairs:
        if queries * keys * head_dim > 2**30 or (which == "backward" and queries > 2048):
            continue
        for query_unit, key_unit in units:
            # The forward pass gains from a longer pipeline, where units are small.
            for depth in (1, 2) if which == "forward" and query_unit * key_unit < 2**18 else (1,):
                yield BlockSizes(
                    queries=queries,
                    keys=keys,
                    query_unit=query_unit,
                    key_unit=key_unit,
                    ahead=depth,
                    lag=depth,
                )


def build(*, generation: str, which: str, head_dim: int, sizes: dict[str, int]) -> tuple[Any, Sequence[Any]]:
    """One pass with these sizes, and its arguments, for `measure`."""
    from pallas_kernels.tpu_static import attention

    heads = max(1, 128 // head_dim)
    shape = {"generation": generation, "sequence": _SEQUENCE, "heads": heads, "head_dim": head_dim}
    return getattr(attention, which)(**shape, blocks=BlockSizes(**sizes))


def tune(generation: str, which: specs.Pass, *, head_dim: int, masked: bool) -> tuple[BlockSizes, float]:
    """The best candidate and its cycles per tile of 1024 x 1024, each printed.

    Raises:
      RuntimeError: none of them compiles.
    """
    tried = list(candidates(which, head_dim=head_dim, masked=masked))
    keywords = {"generation": generation, "which": which, "head_dim": head_dim}
    jobs = [
        Job(
            build=f"{__name__ if __name__ != '__main__' else 'pallas_kernels.attention.tune'}:build",
            keywords={**keywords, "sizes": dataclasses.asdict(sizes)},
            branch="least",
        )
        for sizes in tried
    ]
    tiles = max(1, 128 // head_dim) * (_SEQUENCE / 1024) ** 2
    found = []
    for sizes, report in zip(tried, measure(jobs, generation=generation, evaluate=False), strict=True):
        cycles = None if report.failure else report.kernel_cycles("stall model")
        print(f"{sizes}: {report.failure if cycles is None else round(cycles / tiles, 1)}", flush=True)
        if cycles is not None:
            found.append((cycles / tiles, sizes))
    if not found:
        raise RuntimeError(f"tune: no candidate compiles for {generation}, {which}, head dim {head_dim}")
    cycles, best = min(found, key=lambda pair: pair[0])
    return best, cycles


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", choices=list(GENERATIONS), required=True)
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), required=True)
    parser.add_argument("--head-dim", type=int, choices=(64, 128, 256), default=128)
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--write", action="store_true", help="puts the best into block_sizes.json")
    options = parser.parse_args(argv)
    run = functools.partial(tune, options.generation, options.which)
    best, cycles = run(head_dim=options.head_dim, masked=options.masked)
    if options.write:
        table = json.loads(TABLE.read_text())
        name = specs.entry(options.head_dim, 16, options.masked)
        table[options.generation][options.which][name] = dataclasses.asdict(best)
        TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps({"cycles": round(cycles, 1), **dataclasses.asdict(best)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
