"""Which bundles an interior step of a kernel's grid issues: neither the first of a row of steps nor the last.

A kernel is a loop over its grid. Within it lie regions under a predicate: a branch jumps over them. What
holds no matrix product and more than a few vector instructions begins or ends a row of steps (zeros, the
division by the sum), and what starts a DMA to HBM writes its result: an interior step jumps over both.
Regions that do hold matrix products may be alternatives (a block with a mask or without, a step that is
rarely needed); a `Choice` says which of them a step takes. In a kernel without matrix products, vector
instructions count.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from .dumps import DumpError, Listing, branches

__all__ = ["Alternative", "Choice", "Interior", "interior_step"]

_VECTOR_UNITS = ("VALU", "VLOAD", "VSTORE")
_FEW_VECTORS = 8
"""Bundles with vector instructions in a region that only starts or awaits a DMA to VMEM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What an interior step does where a kernel branches.

    Attributes:
      take: indices into `Interior.alternatives`; those around them are taken too. "most" is the one with most
        work of its own, "fewest" the one with fewest bundles among those that have half as much.
      trips: of the loops inside a step, in program order; those that are not named run once.
      ends: the step is the first and the last of a row of steps as well: what has less than half of the work
        of the alternative with most is done too, and what has none, but for storing constants, which is for
        rows without work.
    """

    take: tuple[int, ...] | Literal["most", "fewest"] = "most"
    trips: tuple[int, ...] = ()
    ends: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """A region under a predicate that holds work of its own.

    Attributes:
      start, stop: its bundles, `stop` exclusive.
      work: slots of the MXU that it uses, without those of alternatives inside it.
      taken: whether the interior step takes it.
    """

    start: int
    stop: int
    work: int
    taken: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interior:
    """One interior step.

    Attributes:
      spans: bundles in the order in which they are issued, as (start, stop); a loop's are repeated.
      alternatives: regions to choose among, in program order.
    """

    spans: tuple[tuple[int, int], ...]
    alternatives: tuple[Alternative, ...]

    @property
    def bundles(self) -> int:
        """How many are issued, which is the number of cycles if nothing stalls."""
        return sum(stop - start for start, stop in self.spans)

    def use(self, listing: Listing) -> dict[str, int]:
        """Slots that are used, by unit."""
        totals = [listing.total(start, stop) for start, stop in self.spans]
        return {unit: sum(total[unit] for total in totals) for unit in listing.units}


def interior_step(listing: Listing, delay_slots: int, choice: Choice = Choice()) -> Interior:
    """Finds the loop over the grid, the largest that holds work, and what one trip of it issues.

    A kernel without such a loop is one step.

    Raises:
      DumpError: `choice` names an alternative that there is not.
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
    """Bundles of a loop or under a predicate, and the regions inside."""

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
    """The whole program as a tree: a jump back closes a loop, a jump ahead leads over a region."""
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
        region.stop = min(region.stop, around[-1].stop)  # The exit of a loop leads beyond it.
        around[-1].inside.append(region)
        around.append(region)
    return program


class _Finder:
    """Weighs regions of one kernel and follows a step through them."""

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
        """Of all bundles; a few vector instructions are none."""
        work = self._work[region.stop] - self._work[region.start]
        return work if work > self._threshold else 0

    def own_work(self, region: _Region) -> int:
        """What is done whenever the region is issued: not what lies under further predicates."""
        own = self.work(region) - sum(map(self.work, region.inside))
        own += sum(self.own_work(inside) for inside in region.inside if inside.loop)
        return own if own > self._threshold else 0

    def chosen(self, step: _Region, candidates: list[_Region], choice: Choice) -> list[_Region]:
        """Candidates that are taken; the step itself, without a predicate, competes with them."""
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
        """Spans of one visit of a region; `ends` is of what lies in it, but not in alternatives inside.

        The only region with work is no alternative, but the step under a predicate that always holds.
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
        """Of a region under a predicate."""
        if self.work(region):
            return any(inside in taken for inside in [region, *region.walk()])
        if ends:
            return self._arithmetic[region.stop] - self._arithmetic[region.start] > _FEW_VECTORS
        if any("dma.vmem_to_hbm" in text for text in self._bundles[region.start : region.stop]):
            return False
        return self._vectors[region.stop] - self._vectors[region.start] <= _FEW_VECTORS
