import functools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.qk_norm_rope.cases import NormRopeCases
from vidgen.pallas_kernels.qk_norm_rope import vjp


class TestTpu(NormRopeCases):
    """Interpreted, in blocks of 16 tokens, so that the last is shorter."""

    norm_rope = staticmethod(
        jax.jit(functools.partial(vjp.norm_rope, rows=16, interpret=True), static_argnames=("eps", "scale"))
    )
    # The reference has all of them; compiled here are two heads of 64, four padded ones, and one of 256.
    slow = (
        *(f"test_a_table_made_once_is_as_good_as_angles[{heads}]" for heads in NormRopeCases.heads[1:]),
        *(f"test_heads[float32-{heads}]" for heads in NormRopeCases.heads[1:]),
        *(f"test_heads[bfloat16-{heads}]" for heads in ((3, 128), (2, 192))),
    )

    @pytest.mark.parametrize(
        ("shape", "kind", "reason"),
        [((1, 64), "float32", "64 channels"), ((1, 384), "float32", "384"), ((2, 64), "float16", "float16")],
    )
    def test_what_is_not_supported_says_so(self, shape, kind, reason):
        x, weight, angles, _ = self.inputs(heads=shape, dtype=kind)
        with pytest.raises(NotImplementedError, match=reason):
            self.norm_rope(x, weight, angles)

    def test_rows_are_chosen(self, monkeypatch):
        monkeypatch.setattr(
            TestTpu, "norm_rope", staticmethod(functools.partial(vjp.norm_rope, interpret=True))
        )
        for length in (7, 300):
            self.check(self.inputs(heads=(3, 128), length=length, dtype="bfloat16"))


@pytest.mark.parametrize("clips", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_races(clips):
    """Two cores take blocks in any order, transfers are as late as they may be, and memory begins as NaN."""
    x, weight, angles, cotangent = NormRopeCases().inputs(length=40, clips=clips)
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, random_seed=1, uninitialized_memory="nan"
    )
    function = functools.partial(vjp.norm_rope, rows=16)
    expected, expected_pullback = jax.vjp(lambda *a: function(*a, angles, interpret=True), x, weight)
    found, pullback = jax.vjp(lambda *a: function(*a, angles, interpret=interpret), x, weight)
    np.testing.assert_array_equal(found, expected)
    assert interpret_pallas_call.races.reads and not interpret_pallas_call.races.races_found
    for ours, theirs in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert interpret_pallas_call.races.reads and not interpret_pallas_call.races.races_found
