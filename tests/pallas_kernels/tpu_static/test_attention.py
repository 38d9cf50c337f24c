"""The attention kernels take no more cycles than the table says, and the command prints them."""

import importlib.util
import json
import math

import pytest

from vidgen.pallas_kernels.attention.specs import BlockSizes
from vidgen.pallas_kernels.tpu_static import __main__ as command
from vidgen.pallas_kernels.tpu_static import attention
from vidgen.pallas_kernels.tpu_static.attention import PASSES, TABLE, Shape
from vidgen.pallas_kernels.tpu_static.generations import GENERATIONS
from vidgen.pallas_kernels.tpu_static.interior import Interior
from vidgen.pallas_kernels.tpu_static.measure import MeasureError
from vidgen.pallas_kernels.tpu_static.program import Instruction
from vidgen.pallas_kernels.tpu_static.report import Kernel, Operation, Report

ALLOWED = 1.05
"""Times the table's cycles. Less is no difference: it is within what the model is good for."""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "jax[tpu]"'
)
needs_table = pytest.mark.skipif(
    not TABLE.exists(), reason="no table: python -m vidgen.pallas_kernels.tpu_static attention --update"
)


def worse(found, expected):
    """What is slower than the table, as sentences; figures by different methods are not compared."""
    lines = []
    for name in PASSES:
        new, old = found[name], expected[name]
        keys = ["stall model", "cycles"] if new["method"] == old["method"] else ["stall model"]
        for key in keys:
            if new[key] is None or (old[key] is not None and new[key] > ALLOWED * old[key]):
                lines.append(f"{name}, {key}: {new[key]} cycles per tile, {old[key]} in {TABLE.name}")
    return lines


@needs_libtpu
@needs_table
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_pass_is_slower(generation, head_dim):
    table, shape = json.loads(TABLE.read_text()), Shape(head_dim=head_dim)
    reports = attention.measure_passes(shape, generation=generation)
    assert [report.failure for report in reports.values()] == ["", ""]
    found = {name: attention.row(report, shape) for name, report in reports.items()}
    assert worse(found, table[generation][str(head_dim)]) == []


def test_slower_is_told_from_different():
    expected = {name: {"cycles": 100.0, "method": "evaluator", "stall model": 90.0} for name in PASSES}
    assert worse(expected, expected) == []
    slower = expected | {"backward": {"cycles": 106.0, "method": "evaluator", "stall model": 94.0}}
    assert worse(slower, expected) == ["backward, cycles: 106.0 cycles per tile, 100.0 in attention.json"]
    assert worse(slower | {"backward": slower["backward"] | {"method": "stall model"}}, expected) == []
    failed = expected | {"forward": {"cycles": None, "method": "evaluator", "stall model": None}}
    assert len(worse(failed, expected)) == 2


def test_tiles_are_of_all_heads():
    assert Shape().heads == 1 and Shape().tiles == 64
    assert Shape(head_dim=64).heads == 2 and Shape(head_dim=64).tiles == 128
    assert Shape(sequence=512, heads=3).tiles == 0.75


def test_a_packed_sequence_has_tiles_steps_and_rows():
    shape = Shape(sequence=32768, heads=4, segments=8)
    assert shape.tiles == 4 * 32**2 / 8
    hints = shape.hints("v6e", BlockSizes(queries=1024, keys=1024, query_unit=256, key_unit=256, heads=2))
    for name in PASSES:
        hint = hints[f"attention_{name}"]
        # Two groups of heads, eight segments, four blocks each.
        assert (hint.rows, hint.steps) == (2 * 8 * 4, 2 * 8 * 4 * 4)
    with pytest.raises(ValueError, match="segments must be of whole blocks"):
        Shape(sequence=8192, segments=16).hints("v6e")


def report(cycles, *, evaluated=True):
    """One kernel of 64 steps, and a copy."""
    about = {"count": 1, "traffic": 0, "scoped_bytes": 2**20}
    copy = Instruction(name="copy.1", opcode="copy", kernel=False, evaluated=64, **about)
    own = {"name": "attend.1", "opcode": "custom-call", "kernel": True}
    call = Instruction(evaluated=64 * cycles if evaluated else None, **own, **about)
    kernel = Kernel(
        instruction=call,
        interior=Interior(spans=((0, 10),), alternatives=()),
        stalled=12,
        steps=64,
        use={"MXU": 10, "VLOAD:FILL": 30},
        least={"MXU": 5.0, "VLOAD:FILL": 10.0},
    )
    return Report(kernels=(kernel,), operations=(Operation(instruction=copy, transfer=9),))


@pytest.fixture
def measured(monkeypatch):
    """Reports by pass, in place of measuring; and the shapes that were asked for."""
    reports, asked = {"forward": report(15), "backward": report(40)}, []

    def measure_passes(shape, *, generation, evaluate, limit):
        asked.append((shape, generation, evaluate))
        if generation == "v5p":
            raise MeasureError("nothing here")
        return reports

    monkeypatch.setattr(command.attention, "measure_passes", measure_passes)
    return reports, asked


def test_the_last_line_is_one_json_object(measured, capsys):
    _, asked = measured
    options = ["attention", "--generation", "v6e", "--head-dim", "64", "--sequence", "16384", "--heads", "1"]
    assert command.main([*options, "--json"]) == 0
    # 256 tiles; the kernel's cycles are of 64 of them.
    expected = {"forward": (15 + 1) / 4, "backward": (40 + 1) / 4, "method": "evaluator"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "v6e": expected | {"forward": 4.0, "backward": pytest.approx(10.25, abs=0.06)}
    }
    assert asked == [(Shape(sequence=16384, head_dim=64, heads=1), "v6e", True)]


def test_methods_are_named_where_they_differ(measured, capsys):
    reports, _ = measured
    reports["backward"] = report(0, evaluated=False)
    assert command.main(["attention", "--json", "--no-evaluator"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["v6e"]
    assert found == {
        "forward": 16.0,
        "backward": 13.0,
        "method": "forward: evaluator, backward: stall model",
    }


def test_the_table_names_kernels_slots_and_operations(measured, capsys):
    assert command.main(["attention"]) == 0
    text = capsys.readouterr().out
    assert "v6e forward: 16.0 cycles per tile, evaluator" in text
    assert "kernel attend.1: evaluator 15.0, stall model 12.0 per tile; VMEM 1.0 MiB" in text
    assert "step: 10 bundles, 12 cycles with stalls, 64 steps; limit MXU" in text
    assert "slots: VLOAD:FILL 100%, MXU 50%" in text and "copy copy.1: 1.0 per tile, evaluator" in text


def test_a_failure_is_told_and_is_the_exit_status(measured, capsys):
    reports, _ = measured
    reports["forward"] = Report(failure="ValueError: no")
    assert command.main(["attention", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["v6e"]["forward"] is None and "v6e forward: ValueError: no" in err
    assert command.main(["attention", "--generation", "v5p"]) == 1
    assert capsys.readouterr().err == "nothing here\n"


@needs_table
def test_the_table_has_all_generations_and_head_dims():
    table = json.loads(TABLE.read_text())
    assert table["sequence"] == Shape().sequence
    for generation, timing in GENERATIONS.items():
        for head_dim in attention.HEAD_DIMS:
            found = table[generation][str(head_dim)]
            for name, products in (("forward", 2), ("backward", 5)):
                # Products of 1024 x 1024 x head_dim, whose MXUs may be half empty.
                ideal = products * 1024**2 * head_dim / timing.macs
                assert math.isfinite(found[name]["cycles"]) and found[name]["cycles"] > ideal
