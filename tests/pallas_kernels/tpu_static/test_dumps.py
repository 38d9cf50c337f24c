"""Listings read what libtpu writes."""

import pytest

from tests.pallas_kernels.tpu_static import cases
from vidgen.pallas_kernels.tpu_static.dumps import Branch, DumpError, branches, read_listing


def test_bundles_and_slots_are_read():
    listing = read_listing(*cases.texts([cases.MULTIPLY, cases.ADD, cases.POP]))
    assert [text.strip(" {}>") for text in listing.bundles] == [
        cases.MULTIPLY[0],
        cases.ADD[0],
        cases.POP[0],
    ]
    assert listing.units == cases.UNITS and listing.capacity == cases.CAPACITY
    assert listing.total(0, 3) == dict.fromkeys(cases.UNITS, 0) | {"MXU": 1, "VALU": 1, "VPOP": 1}
    assert listing.total(1, 2)["VALU"] == 1 and listing.total(2, 2) == dict.fromkeys(cases.UNITS, 0)


def test_lines_below_a_bundle_are_part_of_it():
    dma = ("%5 = dma.hbm_to_vmem /* \nbase_bounds: (1, 1024, 1)\n0x9: no bundle \n*/", {})
    listing = read_listing(*cases.texts([cases.ADD, dma, cases.POP]))
    assert len(listing.bundles) == 3
    assert "base_bounds: (1, 1024, 1)\n0x9: no bundle" in listing.bundles[1]


def test_branches_lead_to_the_first_bundle_of_their_region():
    bundles = cases.program(
        cases.jump(3), cases.starting(3, cases.ADD), cases.jump(3, "!%p2"), cases.jump(8, None)
    )
    assert branches(read_listing(*cases.texts(bundles))) == [
        Branch(source=0, target=1, conditional=True),
        Branch(source=2, target=1, conditional=True),
        # A region without a bundle is the end of the kernel.
        Branch(source=3, target=4, conditional=False),
    ]


def test_an_empty_region_begins_too():
    bundles = [("%6 = sbr.rel (%p1) target = $region4", {}), ("/* Start/End empty region 4 */", {})]
    assert branches(read_listing(*cases.texts(bundles)))[0].target == 1


@pytest.mark.parametrize(
    ("bundles", "table", "message"),
    [
        ("", cases.texts([cases.ADD])[1], "0 bundles"),
        (cases.texts([cases.ADD] * 9)[0], cases.texts([cases.ADD] * 3)[1], "9 bundles, and 4 rows"),
        (cases.texts([cases.ADD])[0], "1 2 3", "names the units"),
    ],
)
def test_what_is_no_dump_is_an_error(bundles, table, message):
    with pytest.raises(DumpError, match=message):
        read_listing(bundles, table)
