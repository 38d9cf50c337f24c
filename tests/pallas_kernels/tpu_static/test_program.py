"""The text of a compiled program."""

import pytest

from vidgen.pallas_kernels.tpu_static.program import instructions, stored_bytes


def config(evaluated=None, modelled=50, scoped=0):
    window = f'"window_config":{{"bounds":["1"],"estimated_cycles":"{modelled}","x":[]}},' if modelled else ""
    memory = f'"used_scoped_memory_configs":[{{"memory_space":"1","offset":"0","size":"{scoped}"}}]'
    found = (
        ""
        if evaluated is None
        else f',"bundle_analysis_data":{{"estimated_cycles":"{evaluated}","flops":"0"}}'
    )
    return f'backend_config={{"flag_configs":[],{window}{memory}{found}}}'


PROGRAM = f"""HloModule jit_f, entry_computation_layout={{(bf16[8,256]{{1,0}})->bf16[8,256]{{1,0}}}}

%fused (param_0: bf16[8,256]) -> bf16[8,256] {{
  %param_0 = bf16[8,256]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %mul = bf16[8,256]{{1,0:T(8,128)(2,1)}} multiply(%param_0, %param_0)
}}

%body (p: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {{
  %p = (s32[], bf16[8,256]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %x = bf16[8,256]{{1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=1
  %fusion.2 = bf16[8,256]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%fused, {config(7)}
  ROOT %t = (s32[], bf16[8,256]{{1,0:T(8,128)(2,1)}}) tuple(%i, %fusion.2)
}}

%sparse (s: bf16[8,256]) -> bf16[8,256] {{
  ROOT %copy.7 = bf16[8,256]{{1,0:T(8,128)(2,1)}} copy(%s), {config(4)}
}}, execution_thread="sparsecore"

%small (q: bf16[8,256]) -> bf16[8,256] {{
  ROOT %copy.8 = bf16[8,256]{{1,0:T(8,128)(2,1)}} copy(%q), {config(1)}
}}

%large (r: bf16[8,256]) -> bf16[8,256] {{
  %copy.9 = bf16[8,256]{{1,0:T(8,128)(2,1)}} copy(%r), {config(2)}
  ROOT %copy.10 = bf16[8,256]{{1,0:T(8,128)(2,1)}} copy(%copy.9), {config(3)}
}}

ENTRY %main.1 (a: bf16[8,256]) -> bf16[8,256] {{
  %a = bf16[8,256]{{1,0:T(8,128)(2,1)}} parameter(0), metadata={{op_name="a"}}
  %copy.1 = bf16[8,256]{{0,1:T(8,128)(2,1)}} copy(%a), {config(30, 90, 64)}
  %bitcast = bf16[2048]{{0}} bitcast(%copy.1)
  %reduce.3 = bf16[8]{{0:T(256)}} reduce(%copy.1, /*index=1*/%a), dimensions={{1}}, {config(0)}
  %attend.1 = (f32[8,128]{{1,0:T(8,128)}}, bf16[8,256]{{1,0:T(8,128)(2,1)}}) custom-call(%copy.1),
 custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="jit(f)/attend"}}, {config(900, None, 4096)}
  %other = f32[] custom-call(%copy.1), custom_call_target="Sharding"
  %while = (s32[], bf16[8,256]{{1,0}}) while(%t0), condition=%cond, body=%body,
 backend_config={{"known_trip_count":{{"n":"5"}}}}
  %cond.1 = bf16[8,256]{{1,0}} conditional(%pred, %a, %a), true_computation=%large, false_computation=%small
  ROOT %call = bf16[8,256]{{1,0}} call(%a), to_apply=%small
}}
"""


def test_what_takes_time_is_found_with_its_cycles():
    found = {(op.name, op.count): op for op in instructions(PROGRAM)}
    assert list(found) == [
        ("copy.1", 1),
        ("reduce.3", 1),
        ("attend.1", 1),
        ("fusion.2", 5),
        ("copy.9", 1),
        ("copy.10", 1),
        ("copy.8", 0),
        ("copy.8", 1),
    ]
    assert [op.name for op in found.values() if op.kernel] == ["attend.1"]
    assert {op.name: op.evaluated for op in found.values()} == {
        "copy.1": 30,
        "reduce.3": None,  # Zero is none.
        "attend.1": 900,
        "fusion.2": 7,
        "copy.9": 2,
        "copy.10": 3,
        "copy.8": 1,
    }
    assert found["copy.1", 1].opcode == "copy" and found["copy.1", 1].scoped_bytes == 64
    assert found["attend.1", 1].scoped_bytes == 4096


def test_traffic_is_of_operands_and_results():
    found = {op.name: op.traffic for op in instructions(PROGRAM)}
    size = 8 * 256 * 2
    # Eight channels last: padded to 128 lanes.
    assert found["copy.1"] == size + 256 * 128 * 2
    assert found["fusion.2"] == 2 * size
    assert found["reduce.3"] == 256 * 128 * 2 + size + 256 * 2
    assert found["attend.1"] == 256 * 128 * 2 + 8 * 128 * 4 + size


def test_the_lesser_branch_can_be_the_one_that_is_taken():
    counts = {op.name: op.count for op in instructions(PROGRAM, "least") if op.name.startswith("copy")}
    assert counts == {"copy.1": 1, "copy.9": 0, "copy.10": 0, "copy.8": 1}
    assert sum(op.count for op in instructions(PROGRAM, "least") if op.name == "copy.8") == 2


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("bf16[2,8192,64]{2,1,0:T(8,128)(2,1)}", 2 * 8192 * 128 * 2),
        ("bf16[1,8192,2,64]{1,3,2,0:T(8,128)(2,1)S(1)}", 8192 * 2 * 64 * 2),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),
        ("s8[100]{0:T(512)}", 512),
        ("pred[]", 1),
        ("f8e4m3fn[4,8]{1,0}", 32),
        ("(f32[2]{0}, (s32[3]{0}, u32[]{:S(2)}))", 8 + 12 + 4),
        ("token[]", 1),
    ],
)
def test_bytes_are_those_of_whole_tiles(type_, expected):
    assert stored_bytes(type_) == expected


def test_a_text_without_an_entry_has_no_operations():
    assert instructions("HloModule empty") == []
