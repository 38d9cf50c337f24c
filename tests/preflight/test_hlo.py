from vidgen.preflight.hlo import count_collectives

TPU = """\
HloModule jit_step, entry_computation_layout={...}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (input.1: f32[8,97]) -> f32[2,97] {
  %all-reduce.7 = f32[8,97]{1,0:T(8,128)} all-reduce(%input.1), channel_id=1, to_apply=%add
  ROOT %slice = f32[2,97]{1,0} dynamic-slice(%all-reduce.7, %index)
}

%body.2 (p: (f32[2,97], s32[])) -> (f32[2,97], s32[]) {
  %all-gather.1 = f32[8,97]{1,0:T(8,128)} all-gather(%x), channel_id=2, dimensions={0}
  %collective-permute-start = (f32[2,97]{1,0}, f32[2,97]{1,0}, u32[]) collective-permute-start(%x)
  %collective-permute-done = f32[2,97]{1,0} collective-permute-done(%collective-permute-start)
}

ENTRY %main.4 (p0: f32[2,97]) -> f32[2,97] {
  %all-reduce.9 = (f32[96]{0:T(128)}, f32[]) all-reduce(%p0, %p1), channel_id=4, to_apply=%add
  %fused = f32[2,97]{1,0} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.3
  %gte = f32[96]{0} get-tuple-element(%all-reduce.9), index=0
  ROOT %all-to-all.5 = f32[4,2]{1,0} all-to-all(%gte), channel_id=5
}
"""

CPU = """\
main.1 (p0: f32[2,97]) -> f32[2,97] {
  reduce-scatter.3 = f32[2,97]{1,0} reduce-scatter(%p0), channel_id=1, to_apply=add
  ROOT all-reduce.9 = f32[96]{0} all-reduce(%p0), channel_id=4, to_apply=add
}
"""


def test_counts_instructions_and_knows_a_scattered_all_reduce():
    assert count_collectives(TPU) == {
        "all-gather": 1,
        "reduce-scatter": 1,
        "all-reduce": 1,
        "all-to-all": 1,
        "collective-permute": 1,
    }
    counts = count_collectives(CPU)
    assert (counts["reduce-scatter"], counts["all-reduce"], counts["all-gather"]) == (1, 1, 0)
