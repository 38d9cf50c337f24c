"""Sequences of tokens: order of patches, timesteps, clips and tokens in the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.core.tokens import Tokens, patchify, unpatchify

CLIPS = [[1, 1, 2, 0], [1, 2, 3, 3]]
KNOWN = [[True, False, True, False], [False, True, False, True]]
TIMES = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])


def tokens(**fields):
    ids = {name: None if value is None else jnp.asarray(value) for name, value in fields.items()}
    return Tokens(jnp.zeros((2, 4, 5)), np.zeros((1, 4, 3), np.int32), **ids)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patches_and_back(patch):
    latents = jnp.arange(2 * 2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 2, 4, 6, 3)
    made = patchify(latents, patch)
    grid = tuple(n // p for n, p in zip((2, 4, 6), patch, strict=True))
    assert made.shape == (2, np.prod(grid), 3 * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(made, grid, patch), latents)
    pt, ph, pw = patch
    np.testing.assert_array_equal(made[1, 1], latents[1, :pt, :ph, pw : 2 * pw].reshape(-1))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"clip_ids": CLIPS}, [[0.1, 0.1, 0.2, None], [0.4, 0.5, 0.6, 0.6]]),
        ({"known_mask": KNOWN}, [[0.0, 0.1, 0.0, 0.1], [0.4, 0.0, 0.4, 0.0]]),
        ({"clip_ids": CLIPS, "known_mask": KNOWN}, [[0.0, 0.1, 0.0, None], [0.4, 0.0, 0.6, 0.0]]),
        ({"time_ids": [[2, 1, 0, 0], [1, 1, 1, 2]]}, [[0.3, 0.2, 0.1, 0.1], [0.5, 0.5, 0.5, 0.6]]),
        (
            {"time_ids": [[2, 1, 0, 0], [1, 1, 1, 2]], "clip_ids": CLIPS, "known_mask": KNOWN},
            [[0.0, 0.2, 0.0, None], [0.5, 0.0, 0.5, 0.0]],
        ),
    ],
)
def test_each_token_has_the_timestep_of_its_clip_or_its_index_and_0_if_it_is_known(fields, expected):
    """None is padding, whose index selects nothing."""
    times = TIMES if fields.keys() & {"clip_ids", "time_ids"} else TIMES[:, :1]
    levels, ids = tokens(**fields).noise_levels(times)
    of_tokens = np.where(ids < 0, np.nan, np.take_along_axis(np.asarray(levels), np.asarray(ids), axis=1))
    np.testing.assert_array_equal(of_tokens, np.asarray(expected, np.float32))


def test_one_timestep_for_all_tokens_needs_no_indices():
    levels, ids = tokens().noise_levels(TIMES[:, :1])
    np.testing.assert_array_equal(levels, TIMES[:, :1])
    assert ids is None


def test_tokens_of_each_clip():
    assert tokens().of_clips(1).shape == (2, 4, 1) and tokens().of_clips(1).all()
    expected = [[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]]
    np.testing.assert_array_equal(tokens(clip_ids=CLIPS).of_clips(3), expected)


def test_known_tokens_and_padding_are_not_in_the_loss_unless_a_mask_says_so():
    assert tokens().counted() is None
    used, known = np.asarray(CLIPS) > 0, np.asarray(KNOWN)
    np.testing.assert_array_equal(tokens(clip_ids=CLIPS).counted(), used)
    np.testing.assert_array_equal(tokens(known_mask=KNOWN).counted(), ~known)
    both = tokens(clip_ids=CLIPS, known_mask=KNOWN)
    np.testing.assert_array_equal(both.counted(), used & ~known)
    np.testing.assert_array_equal(both._replace(loss_mask=jnp.asarray(KNOWN)).counted(), known)
