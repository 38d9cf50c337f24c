"""Readers of libtpu's dumps of a kernel: its final bundles, and the slots that each bundle uses."""

import dataclasses
import re
from collections.abc import Sequence

__all__ = ["Branch", "DumpError", "Listing", "branches", "read_listing"]

_BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:L[BHE]|P[BF]|CT)?\s*:(.*)$")
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(
    r"sbr\.rel\s*(?P<predicate>\(!?%\w+\))?\s*target = (?:\$region(?P<region>\d+)|bundleno = (?P<bundle>\d+))"
)


class DumpError(ValueError):
    """A dump does not have the expected format; the message names the place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A jump from one bundle to another.

    Attributes:
      source, target: indices of bundles.
      conditional: whether the jump may fall through.
    """

    source: int
    target: int
    conditional: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The bundles of a kernel: one is issued per cycle unless something stalls.

    Attributes:
      bundles: text of each bundle, in program order.
      units: names of the columns of `use`, e.g. MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE,
        VSTORE:SPILL, SALU; fills and spills are part of the loads and stores.
      capacity: slots of each unit in a bundle.
      use: used slots, by bundle and unit.
    """

    bundles: tuple[str, ...]
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    use: tuple[tuple[int, ...], ...]

    def total(self, start: int, stop: int) -> dict[str, int]:
        """Slots that the bundles `start` to `stop - 1` use, by unit."""
        sums = (sum(column) for column in zip(*self.use[start:stop], strict=True))
        return dict(zip(self.units, sums, strict=True)) if stop > start else dict.fromkeys(self.units, 0)


def read_listing(bundles: str, utilization: str) -> Listing:
    """Parses the texts of `*final_bundles.txt` and `*final_hlo-static-per-bundle-utilization.txt`.

    Raises:
      DumpError: there are no bundles, there is no table of slots, or the table has fewer rows than bundles.
    """
    texts = _read_bundles(bundles.splitlines())
    units, rows = _read_utilization(utilization.splitlines())
    # The table may have a few more rows than there are bundles.
    if not texts or len(rows) <= len(texts):
        raise DumpError(
            f"{len(texts)} bundles, and {max(0, len(rows) - 1)} rows of slots: expected the dumps of one "
            "kernel, with at least as many rows as bundles"
        )
    return Listing(bundles=tuple(texts), units=units, capacity=rows[0], use=tuple(rows[1 : len(texts) + 1]))


def _read_bundles(lines: Sequence[str]) -> list[str]:
    """Text of each bundle: the line with its index and the lines below it, e.g. of a DMA's window."""
    texts: list[str] = []
    for line in lines:
        match = _BUNDLE.match(line)
        if match and int(match[1] or "0", 16) == len(texts):
            texts.append(match[2])
        elif texts:
            texts[-1] += "\n" + line
    return texts


def _read_utilization(lines: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Names of the units, and rows of slots: first the capacity, then one row per bundle."""
    units: tuple[str, ...] = ()
    rows: list[tuple[int, ...]] = []
    for line in lines:
        if line.startswith("MXU"):
            units = tuple(name.strip() for name in line.split(","))
        fields = line.split()
        if units and len(fields) == len(units) and all(field.isdigit() for field in fields):
            rows.append(tuple(map(int, fields)))
    if not units:
        raise DumpError("the table of slots has no line that names the units, MXU first")
    return units, rows


def branches(listing: Listing) -> list[Branch]:
    """All jumps of a kernel, in program order; a jump to a region without a bundle ends the kernel."""
    starts: dict[str, int] = {}
    for index, text in enumerate(listing.bundles):
        for region in _LABEL.findall(text):
            starts.setdefault(region, index)
    found = []
    for index, text in enumerate(listing.bundles):
        for match in _BRANCH.finditer(text):
            if match["region"] is None:
                target = int(match["bundle"])
            else:
                target = starts.get(match["region"], len(listing.bundles))
            found.append(Branch(source=index, target=target, conditional=match["predicate"] is not None))
    return found
