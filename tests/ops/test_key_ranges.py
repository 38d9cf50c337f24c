"""Key ranges mean the masks written out, and sort so that kernels skip blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.ops.key_ranges import cross_attention_ranges, self_attention_ranges

CLIPS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [3, 3, 1, 1, 1, 1, 1, 1, 1]], np.int32)
CHUNKS = np.array([[0, 0, 1, 2, 0, 1, 1, 0, 0], [0, 4, 0, 1, 1, 2, 2, 3, 3]], np.int32)
MASK = np.array([[1, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0, 1]], bool)
SAME = CLIPS[:, :, None] == CLIPS[:, None]
AHEAD = CHUNKS[:, :, None] - CHUNKS[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_ids": CLIPS}, SAME),
        ({"chunk_ids": CHUNKS}, AHEAD >= 0),
        ({"clip_ids": CLIPS, "chunk_ids": CHUNKS}, SAME & (AHEAD >= 0)),
        ({"clip_ids": CLIPS, "chunk_ids": CHUNKS, "past_chunks": 1}, SAME & (AHEAD >= 0) & (AHEAD <= 1)),
        ({"chunk_ids": CHUNKS, "past_chunks": 0}, AHEAD == 0),
        ({}, np.ones_like(SAME)),
    ],
)
def test_self_attention(options, expected, masked):
    options = {name: x if isinstance(x, int) else jnp.asarray(x) for name, x in options.items()}
    ranges = self_attention_ranges(**options, key_mask=jnp.asarray(MASK) if masked else None)
    if ranges is None:
        assert not options and not masked
    else:
        expected = expected & MASK[:, None] if masked else expected
        np.testing.assert_array_equal(ranges.visible(), expected)
        np.testing.assert_array_equal(ranges._replace(high=ranges.limits[1]).visible(), expected)


@pytest.mark.parametrize("chunks", [None, CHUNKS])
def test_codes_of_a_packed_row_do_not_decrease_with_padding_last(chunks):
    ranges = self_attention_ranges(jnp.asarray(CLIPS), None if chunks is None else jnp.asarray(chunks))
    codes, limits = ranges.codes[0], [x[0] for x in ranges.limits]
    for x in (codes, *limits):
        assert (np.diff(x) >= 0).all() and (x[7:] > x[:7].max()).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cross_attention(packed, masked):
    keys, mask = CLIPS[:, [0, 5, 2, 7]], MASK[:, :4]
    ranges = cross_attention_ranges(
        9,
        clip_ids=(jnp.asarray(CLIPS), jnp.asarray(keys)) if packed else None,
        key_mask=jnp.asarray(mask) if masked else None,
    )
    expected = np.ones((2, 9, 4), bool)
    if packed:
        expected &= CLIPS[:, :, None] == keys[:, None]
    if masked:
        expected &= mask[:, None]
    if packed or masked:
        np.testing.assert_array_equal(ranges.visible(), expected)
    else:
        assert ranges is None
