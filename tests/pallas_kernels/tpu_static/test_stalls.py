"""The stall model, on bundles whose cycles can be counted by hand."""

import pytest

from vidgen.pallas_kernels.tpu_static.generations import GENERATIONS
from vidgen.pallas_kernels.tpu_static.stalls import stall_cycles

V6E, V5E, TPU7X = (GENERATIONS[name] for name in ("v6e", "v5e", "tpu7x"))
PUSH, POP = "%1 = vmatmul.mubr.bf16.gmra.mxu0 %v1", "%v2 = vpop.f32.mrf.mxu0"


def cycles(bundles, generation=V6E):
    return stall_cycles(bundles, [(0, len(bundles))], generation)


def test_bundles_without_products_take_a_cycle_each():
    assert cycles(["%v1 = vadd.f32 %v2, %v3", "%v4 = vpop.eup %v5", "%6 = vpop.xlane.xlu0 %7"]) == 3


def test_a_result_is_awaited():
    # Accepted at 0, 8 cycles in the MXU, 100 until it may be popped.
    assert cycles([PUSH, POP]) == 8 + 100 + 1
    assert cycles([PUSH, *[""] * 200, POP]) == 202


def test_multiplies_queue_up():
    # Two wait while one is in the MXU; the fourth is accepted as the second begins, at 8.
    assert cycles([PUSH] * 3) == 3
    assert cycles([PUSH] * 4) == 8 + 1
    assert cycles([PUSH] * 10) == 7 * 8 - 8 + 1 + 8


def test_units_are_independent():
    other = PUSH.replace("mxu0", "mxu1")
    assert cycles([f"{PUSH}  ;;  {other}"] * 3) == 3


def test_results_leave_in_order():
    # Four per multiply; the fifth pop is of the second multiply, which ends 8 cycles later.
    assert cycles([PUSH, PUSH, *[POP] * 4]) == 108 + 4
    assert cycles([PUSH, PUSH, *[POP] * 5]) == 116 + 1


def test_results_with_addresses_are_found_by_them():
    push = "%1 = vmatmul.mubr.bf16.gmra.mrb[{}].mxu0 %v1"
    pop = "%v2 = vpop.f32.mrb[{}].mxu0"
    bundles = [push.format(0), push.format(4), pop.format(4), pop.format(0)]
    assert cycles(bundles, TPU7X) == 16 + 150 + 2
    assert cycles([pop.format(9)], TPU7X) == 1  # From before.


@pytest.mark.parametrize(
    ("generation", "kind", "expected"),
    [
        (V6E, "bf16", 8),
        (V6E, "f32", 4),
        (V6E, "f8e4m3", 8),
        (V5E, "bf16", 16),
        (V5E, "f32", 8),
        (V5E, "s8", 16),
    ],
)
def test_types_differ_in_time(generation, kind, expected):
    push = f"%1 = vmatmul.{kind}.vlgmr.msra.gmra.mxu0 %v1"
    assert cycles([push] * 12, generation) - cycles([push] * 11, generation) == expected


def test_spans_are_issued_one_after_the_other():
    bundles = [PUSH, *[""] * 50, POP, ""]
    assert stall_cycles(bundles, [(0, 1), (51, 53)], V6E) == 108 + 2
    assert stall_cycles(bundles, [(52, 53)] * 5, V6E) == 5
