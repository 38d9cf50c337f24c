"""Small dumps as libtpu writes them."""

import itertools

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
CAPACITY = (2, 2, 4, 2, 1, 3, 3, 2, 2, 2)

MULTIPLY = ("%1 = vmatmul.mubr.bf16.gmra.mxu0 %v1_v2", {"MXU": 1})
POP = ("%v2_v3 = vpop.f32.mrf.mxu0", {"VPOP": 1})
ADD = ("%v3_v4 = vadd.f32 %v1_v0, %v2_v3", {"VALU": 1})
STORE = ("%3 = vst [vmem:[%s1] sm:$0xff] %v3_v4", {"VSTORE": 1})
SCALAR = ("%s2_s1 = sadd.s32 1, %s1_s0", {"SALU": 1})
SEND = ("%4 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s1, /*hbm=*/%s2", {"SALU": 1})
RECEIVE = ("%5 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*vmem=*/%s2", {"SALU": 1})
NOTHING = ("", {})
SLOTS = [NOTHING] * 4
"""Delay slots of a branch, of v6e."""


def jump(region, predicate="%p1"):
    condition = f"({predicate}) " if predicate else ""
    return (f"%6 = sbr.rel {condition}target = $region{region}", {"SALU": 1})


def starting(region, bundle):
    """The bundle, as the first one of a region."""
    return (f"{bundle[0]} }} /* Start region {region} ", bundle[1])


def texts(bundles):
    """Contents of both files."""
    lines = ["= control target key start", "LB: loop body", "= control target key end", ""]
    for index, (text, _) in enumerate(bundles):
        address = "0" if index == 0 else f"{index:#x}"
        lines.append(f"{address:>6}   : > {{ {text} }}")
    table = [
        "== CAPACTIY:",
        ", ".join(UNITS),
        " ".join(f"{slots:5}" for slots in CAPACITY),
        "== UTILIZATION:",
    ]
    table += [" ".join(str(use.get(unit, 0)) for unit in UNITS) for _, use in bundles]
    table.append(" ".join("0" * len(UNITS)))  # One more than there are bundles.
    return "\n".join(lines), "\n".join(table)


def program(*parts):
    """Bundles of parts that are bundles or lists of them."""
    return list(itertools.chain.from_iterable([part] if isinstance(part, tuple) else part for part in parts))


KERNEL = program(
    [SCALAR] * 3,
    starting(7, SCALAR),  # 3: the loop over the grid.
    RECEIVE,
    jump(1),  # 5: over the first step's zeros.
    SLOTS,
    [STORE] * 12,  # 10
    starting(1, SCALAR),  # 22
    jump(2),  # 23: over the block without a mask.
    SLOTS,
    [MULTIPLY] * 10,  # 28
    [POP] * 10,
    starting(2, SCALAR),  # 48
    jump(3),  # 49: over the block with a mask.
    SLOTS,
    [MULTIPLY] * 10,  # 54
    [ADD] * 30,
    [POP] * 10,
    starting(3, SCALAR),  # 104
    jump(4),  # 105: over what waits for a block.
    SLOTS,
    [SCALAR] * 2,  # 110
    starting(4, SCALAR),  # 112
    jump(5),  # 113: over the result's way to HBM.
    SLOTS,
    SEND,  # 118
    [SCALAR] * 3,
    starting(5, SCALAR),  # 122
    jump(7, "!%p9"),  # 123
    SLOTS,
    [SCALAR] * 4,  # 128
)
"""A loop over a grid whose step has a body of 20 bundles, and one of 50 for blocks with a mask."""
