"""Reports put together what a worker's folder holds."""

import json

import pytest

from tests.pallas_kernels.tpu_static import cases
from vidgen.pallas_kernels.tpu_static.interior import Choice
from vidgen.pallas_kernels.tpu_static.report import Hint, Report, read_report

STEP = 59 + 50
"""Bundles of a step of cases.KERNEL with the mask."""


def program(evaluated, others=""):
    target = 'custom_call_target="tpu_custom_call"'
    found = f'"bundle_analysis_data":{{"estimated_cycles":"{evaluated}"}}' if evaluated else ""
    return f"""HloModule jit_f
ENTRY %main.1 (a: bf16[1024,937]) -> bf16[8,128] {{
  %a = bf16[1024,937]{{1,0}} parameter(0)
{others}  ROOT %attend.2 = bf16[8,128]{{1,0}} custom-call(%a), {target}, backend_config={{{found}}}
}}
"""


@pytest.fixture
def folder(tmp_path):
    """Of a job with one kernel of 100 steps, evaluated to 100 cycles more than the stall model's."""
    bundles, table = cases.texts(cases.KERNEL)
    for name in ("attend.2", "late-initialization", "attend.2-more"):
        prefix = tmp_path / f"1795614316687458213-{name}"
        kernel = name == "attend.2"
        (tmp_path / f"{prefix.name}-03-final_bundles.txt").write_text(bundles if kernel else "")
        (tmp_path / f"{prefix.name}-02-schedule-analysis_final_bundles.txt").write_text("nothing")
        name = f"{prefix.name}-01-final_hlo-static-per-bundle-utilization.txt"
        (tmp_path / name).write_text(table if kernel else "")
    (tmp_path / "grids.json").write_text(json.dumps([["attend", 100], ["another", 7]]))
    (tmp_path / "program.txt").write_text(program(40_000))
    return tmp_path


MASKED = {"attend": Hint(choice=Choice(take=(1,)))}


def read(folder, hints=MASKED, branch="most"):
    return read_report(folder, hints, branch, "v6e")


def test_a_kernel_has_its_step_its_slots_and_both_totals(folder):
    report = read(folder)
    [kernel] = report.kernels
    assert (kernel.interior.bundles, kernel.steps) == (STEP - 20, 100)
    # Multiplies begin at 19, 27, 35 ...; the first results are there at 127, 135, 143, four each; ten are
    # popped, until 145; 20 bundles follow.
    assert kernel.stalled == 165 and kernel.modelled == 16_500
    assert kernel.evaluated == 40_000 and report.method == "evaluator" and report.cycles() == 40_000
    assert kernel.use["VALU"] == 30 and kernel.least["VALU"] == 7.5 and kernel.least["MXU"] == 5
    assert kernel.bottleneck == "VALU"
    assert report.kernel_cycles("stall model") == kernel.modelled
    assert report.failure == ""


def test_an_evaluator_that_skipped_the_body_is_not_believed(folder):
    (folder / "program.txt").write_text(program(2_000))
    report = read(folder)
    [kernel] = report.kernels
    assert kernel.instruction.evaluated == 2_000 and kernel.evaluated is None
    assert report.method == "stall model" and report.cycles() == kernel.modelled
    assert report.kernel_cycles("evaluator") is None


def test_hints_say_how_many_steps_and_which_body(folder):
    [kernel] = read(folder, {"other": Hint(steps=1), "att.*": Hint(steps=3)}).kernels
    assert kernel.steps == 3
    assert [a.taken for a in kernel.interior.alternatives] == [True, False]


def test_rows_of_steps_have_ends(folder):
    """The other body of the kernel has as much work, and is none."""
    [kernel] = read(folder, {"attend": Hint(steps=6, rows=2, choice=Choice(take="fewest"))}).kernels
    assert kernel.rows == 2 and kernel.modelled == 6 * kernel.stalled + 2 * kernel.ends


def test_the_end_of_a_row_may_be_another_body(folder):
    """Whatever else ends a row is then not done."""
    other = Choice(take=(0, 1))
    hint = Hint(steps=6, rows=2, choice=Choice(take="fewest"), end=other)
    [kernel] = read(folder, {"attend": hint}).kernels
    [alone] = read(folder, {"attend": Hint(choice=other)}).kernels
    assert kernel.ends == alone.stalled - kernel.stalled > 0


def test_kernels_of_one_name_and_different_grids_have_no_steps(folder):
    (folder / "grids.json").write_text(json.dumps([["attend", 100], ["attend", 7]]))
    (folder / "program.txt").write_text(program(None))
    report = read(folder)
    assert report.kernels[0].steps is None and report.cycles() is None


def test_other_operations_are_counted_by_the_evaluator_or_their_bytes(folder):
    config = '"window_config":{"estimated_cycles":"5"}'
    evaluated = f'{config},"bundle_analysis_data":{{"estimated_cycles":"123"}}'
    others = f"""  %copy.1 = bf16[1024,937]{{1,0}} copy(%a), backend_config={{{evaluated}}}
  %copy.2 = bf16[1024,937]{{1,0}} copy(%a), backend_config={{{config}}}
"""
    (folder / "program.txt").write_text(program(40_000, others))
    report = read(folder)
    # Two arrays of 1024 * 937 * 2 bytes at 937 bytes per cycle.
    assert [operation.cycles for operation in report.operations] == [123, 4096]
    assert report.operation_cycles() == 123 + 4096 and report.cycles() == 40_000 + 123 + 4096


def test_a_kernel_compiled_once_stands_for_its_equals(folder):
    text = program(40_000).replace("attend.2", "attend.5")
    (folder / "program.txt").write_text(text)
    assert read(folder).kernels[0].instruction.name == "attend.5"


def test_a_kernel_can_be_left_out(folder):
    report = read(folder)
    assert report.without("attend").kernels == () and report.without("att").kernels == report.kernels
    assert report.without("attend").cycles() == 0


def test_errors_are_reported(folder):
    (folder / "program.txt").write_text(program(1).replace("attend.2", "unknown.1"))
    assert "kernel unknown.1: libtpu wrote no bundles; there are ['attend.2'" in read(folder).failure
    (folder / "error").write_text("ValueError: no")
    report = read(folder)
    assert report == Report(failure="ValueError: no") and report.cycles() is None
