"""Finds the bundles of an interior step of a kernel's grid: neither the first nor the last of a row of steps.

A row of steps is the steps of one outer block. A kernel is a loop over its grid, with predicated regions that
a branch jumps over. A region without a matrix product but with more than a few vector instructions starts or
ends a row of steps (zeros, the division by the sum), and a region that starts a DMA to HBM stores its result:
an interior step jumps over both. Regions with matrix products may be alternatives (a block with a mask or
without, a rarely needed step); a `Choice` says which of them a step takes. In a kernel without matrix
products, vector instructions count instead.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from .dumps import DumpError, Listing, branches

__all__ = ["Alternative", "Choice", "Interior", "interior_step"]

_VECTOR_UNITS = ("VALU", "VLOAD", "VSTORE")
_FEW_VECTORS = 8
"""Most bundles with vector instructions in a region that only starts or awaits a DMA to VMEM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The branches that an interior step takes.

    Attributes:
      take: indices into `Interior.alternatives`; enclosing alternatives are taken too. "most" is the one with
        the most work outside nested regions, "fewest" the one with the fewest bundles among those with at
        least half as much.
      trips: trip counts of the loops inside a step, in program order; further loops run once.
      ends: whether the step is both the first and the last of a row: then it also takes alternatives with
        less than half of the most work, and regions without work, except those that store constants, which
        are for rows without work.
    """

    take: tuple[int, ...] | Literal["most", "fewest"] = "most"
    trips: tuple[int, ...] = ()
    ends: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """A predicated region with work outside nested regions.

    Attributes:
      start, stop: range of bundles, `stop` exclusive.
      work: MXU slots used, without those of nested alternatives.
      taken: whether the interior step takes the region.
    """

    start: int
    stop: int
    work: int
    taken: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interior:
    """One interior step.

    Attributes:
      spans: (start, stop) of bundles in the order of issue; those of a loop are repeated.
      alternatives: regions to choose among, in program order.
    """

    spans: tuple[tuple[int, int], ...]
    alternatives: tuple[Alternative, ...]

    @property
    def bundles(self) -> int:
        """Number of issued bundles: the cycles of the step if nothing stalls."""
        return sum(stop - start for start, stop in self.spans)

    def use(self, listing: Listing) -> dict[str, int]:
        """Used slots, by unit."""
        totals = [listing.total(start, stop) for start, stop in self.spans]
        return {unit: sum(total[unit] for total in totals) for unit in listing.units}


def interior_step(listing: Listing, delay_slots: int, choice: Choice = Choice()) -> Interior:
    """The bundles of one trip of the loop over the grid, which is the largest loop with work.

    A kernel without such a loop is one step.

    Raises:
      DumpError: `choice.take` has an index out of range.
    """
    finder = _Finder(listing)
    program = _regions(listing, delay_slots)
    loops = [region for region in program.walk() if region.loop and finder.work(region)]
    step = max(loops, key=lambda region: region.stop - region.start, default=program)
    candidates = [region for region in step.walk() if not region.loop and finder.own_work(region)]
    taken = finder.chosen(step, candidates, choice)
    trips = dict(zip((region for region in step.walk() if region.loop), choice.trips, strict=False))
    return Interior(
        spans=tuple(finder.issued(step, taken, trips, choice.ends)),
        alternatives=tuple(
            Alternative(
                start=region.start, stop=region.stop, work=finder.own_work(region), taken=region in taken
            )
            for region in candidates
        ),
    )


@dataclasses.dataclass(eq=False, kw_only=True)
class _Region:
    """A loop or a predicated range of bundles, and the regions inside."""

    start: int
    stop: int
    loop: bool
    inside: list["_Region"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["_Region"]:
        """All regions inside, in program order."""
        for region in self.inside:
            yield region
            yield from region.walk()


def _regions(listing: Listing, delay_slots: int) -> _Region:
    """The program as a tree of regions: a backward jump closes a loop, a forward jump skips a region."""
    count = len(listing.bundles)
    found = []
    for branch in branches(listing):
        after = min(count, branch.source + 1 + delay_slots)
        if branch.target <= branch.source:
            found.append(_Region(start=branch.target, stop=after, loop=True))
        elif branch.target > after:
            found.append(_Region(start=after, stop=branch.target, loop=False))
    program = _Region(start=0, stop=count, loop=False)
    around = [program]
    for region in sorted(found, key=lambda region: (region.start, -region.stop, region.loop)):
        while region.start >= around[-1].stop:
            around.pop()
        region.stop = min(region.stop, around[-1].stop)  # A jump out of a loop ends beyond the loop.
        around[-1].inside.append(region)
        around.append(region)
    return program


class _Finder:
    """Measures the work of one kernel's regions and traces a step through them."""

    def __init__(self, listing: Listing):
        self._bundles = listing.bundles
        vector = [listing.units.index(unit) for unit in _VECTOR_UNITS]
        mxu = [row[listing.units.index("MXU")] for row in listing.use]
        slots = [sum(row[unit] for unit in vector) for row in listing.use]
        self._work = [0, *itertools.accumulate(mxu if any(mxu) else slots)]
        self._vectors = [0, *itertools.accumulate(map(bool, slots))]
        arithmetic = listing.units.index("VALU")
        self._arithmetic = [0, *itertools.accumulate(row[arithmetic] for row in listing.use)]
        self._threshold = 0 if any(mxu) else _FEW_VECTORS

    def work(self, region: _Region) -> int:
        """Work of all bundles in the region; 0 up to `_FEW_VECTORS` if vector instructions count."""
        work = self._work[region.stop] - self._work[region.start]
        return work if work > self._threshold else 0

    def own_work(self, region: _Region) -> int:
        """Work done whenever the region is issued: without predicated regions inside it."""
        work = self.work(region) - sum(map(self.work, region.inside))
        work += sum(self.own_work(inside) for inside in region.inside if inside.loop)
        return work if work > self._threshold else 0

    def chosen(self, step: _Region, candidates: list[_Region], choice: Choice) -> list[_Region]:
        """The candidates that the step takes; the unpredicated step itself competes with them."""
        take = choice.take
        if isinstance(take, tuple):
            if any(not 0 <= index < len(candidates) for index in take):
                raise DumpError(f"take={take}: the kernel has {len(candidates)} alternatives")
            picked = [candidates[index] for index in take]
        elif take == "most":
            picked = [max([step, *candidates], key=self.own_work)]
        else:
            most = max(map(self.own_work, [step, *candidates]))
            heavy = [region for region in [step, *candidates] if 2 * self.own_work(region) >= most]
            picked = [min(heavy, key=lambda region: region.stop - region.start)]
        if choice.ends:
            most = max(map(self.own_work, [step, *candidates]))
            picked += [region for region in candidates if 2 * self.own_work(region) < most]
        return [
            region
            for region in candidates
            if region in picked or any(inside in picked for inside in region.walk())
        ]

    def issued(
        self, region: _Region, taken: list[_Region], trips: dict[_Region, int], ends: bool
    ) -> Iterator[tuple[int, int]]:
        """Spans issued in one pass through a region; `ends` does not apply inside nested alternatives.

        If one region inside has all the work, it is not an alternative: its predicate always holds.
        """
        position = region.start
        for inside in region.inside:
            if inside.start > position:
                yield position, inside.start
            visits = trips.get(inside, 1) if inside.loop else int(self._is_taken(inside, taken, ends))
            alternative = inside in taken and self.work(inside) < self.work(region)
            for _ in range(visits):
                yield from self.issued(inside, taken, trips, ends and not alternative)
            position = inside.stop
        if region.stop > position:
            yield position, region.stop

    def _is_taken(self, region: _Region, taken: list[_Region], ends: bool) -> bool:
        """Whether the step takes a predicated region."""
        if self.work(region):
            return any(inside in taken for inside in [region, *region.walk()])
        if ends:
            return self._arithmetic[region.stop] - self._arithmetic[region.start] > _FEW_VECTORS
        if any("dma.vmem_to_hbm" in text for text in self._bundles[region.start : region.stop]):
            return False
        return self._vectors[region.stop] - self._vectors[region.start] <= _FEW_VECTORS
