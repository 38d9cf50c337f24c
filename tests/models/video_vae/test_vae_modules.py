import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.video_vae.modules import (
    Downsample,
    FrameAttention,
    SpatialConv,
    Upsample,
    average_down,
    repeat_up,
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_attention_is_among_the_positions_of_a_frame():
    module = random_module(lambda: FrameAttention(6, rngs=nnx.Rngs(0)))
    apply = jax.jit(lambda x: module(x))
    x = normal(2, 3, 2, 3, 6)
    change = np.abs(apply(x.at[0, 1, 1, 2].add(1.0)) - apply(x)).max(-1)
    assert change[0, 1].min() > 1e-4, "a position does not see all of its frame"
    change[0, 1] = 0.0
    assert not change.any(), "a position sees another frame"


def test_attention_against_numpy():
    module = random_module(lambda: FrameAttention(6, rngs=nnx.Rngs(0)))
    x = normal(1, 1, 2, 2, 6)
    tokens = np.asarray(x, np.float64).reshape(4, 6)
    normed = (
        tokens / np.linalg.norm(tokens, axis=1, keepdims=True) * 6**0.5 * np.asarray(module.norm.scale[...])
    )
    linear = lambda layer, x: x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])  # noqa: E731
    q, k, v = np.split(linear(module.to_qkv, normed), 3, axis=1)
    weights = np.exp(q @ k.T / 6**0.5)
    attended = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(
        module(x).reshape(4, 6), tokens + linear(module.out, attended), rtol=1e-4, atol=1e-5
    )


def test_downsampling_pads_after_the_last_row_and_column():
    """As Wan: window i covers rows 2 i, 2 i + 1, 2 i + 2."""
    module = random_module(lambda: SpatialConv(1, 1, resize="half", rngs=nnx.Rngs(0)))
    x = normal(1, 1, 4, 6, 1)
    padded = np.pad(np.asarray(x)[0, 0, :, :, 0], ((0, 1), (0, 1)))
    kernel = np.asarray(module.kernel[...])[0, :, :, 0, 0]
    expected = [[(padded[i : i + 3, j : j + 3] * kernel).sum() for j in (0, 2, 4)] for i in (0, 2)]
    np.testing.assert_allclose(
        module(x)[0, 0, :, :, 0], np.asarray(expected) + module.bias[0], rtol=1e-4, atol=1e-5
    )


def test_the_first_frame_passes_time_sampling_alone():
    down = random_module(lambda: Downsample(2, temporal=True, rngs=nnx.Rngs(0)))
    x = normal(1, 5, 4, 4, 2)
    y, first = jax.jit(lambda x: (down(x), down.space(x)))(x)
    assert y.shape == (1, 3, 2, 2, 2)
    np.testing.assert_allclose(y[:, 0], first[:, 0], rtol=1e-5, atol=1e-6)
    taps = np.asarray(down.time.kernel[...], np.float64)[:, 0, 0]
    for out, frames in {1: (0, 1, 2), 2: (2, 3, 4)}.items():
        expected = sum(np.asarray(first)[0, f] @ taps[tap] for tap, f in enumerate(frames))
        expected = expected + np.asarray(down.time.bias[...])
        np.testing.assert_allclose(y[0, out], expected, rtol=1e-4, atol=1e-5)

    up = random_module(lambda: Upsample(2, 3, temporal=True, rngs=nnx.Rngs(0)))
    x = normal(1, 3, 2, 2, 2)
    y, image = jax.jit(lambda x: (up(x), up(x[:, :1])))(x)
    assert y.shape == (1, 5, 4, 4, 3)
    np.testing.assert_allclose(y[:, :1], image, rtol=1e-5, atol=1e-6)
    # The two frames of each later latent come from different channels.
    assert np.abs(y[:, 1] - y[:, 2]).max() > 1e-2


def test_before_training_resampling_in_time_drops_and_repeats_frames():
    down, up = (
        lambda x: Downsample(2, temporal=True, rngs=nnx.Rngs(0))(x),
        lambda x: Upsample(2, 3, temporal=True, rngs=nnx.Rngs(0))(x),
    )
    frames = lambda function, x, which: jnp.concatenate([function(x[:, [i]]) for i in which], axis=1)  # noqa: E731
    x = normal(1, 5, 4, 4, 2)
    np.testing.assert_allclose(down(x), frames(down, x, (0, 2, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(up(x[:, :3]), frames(up, x, (0, 1, 1, 2, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3])
def test_average_down_leaves_the_first_frame_unmixed(frames):
    x = normal(1, frames, 2, 4, 3)
    y = average_down(x, 6, (2, 2, 2))
    assert y.shape == (1, (frames + 1) // 2, 1, 2, 6)
    # 24 numbers, channel slowest, then time, row, column, in 6 groups of 4: a channel's first group is
    # the zero frame before frame 0.
    for column in (0, 1):
        window = np.asarray(x)[0, 0, :, 2 * column : 2 * column + 2]
        expected = np.stack([np.zeros(3), window.mean((0, 1))], axis=1).reshape(-1)
        np.testing.assert_allclose(y[0, 0, 0, column], expected, rtol=1e-5, atol=1e-6)
    if frames == 3:
        window = np.asarray(x)[0, 1:, :, 2:]
        np.testing.assert_allclose(y[0, 1, 0, 1], window.mean((1, 2)).T.reshape(-1), rtol=1e-5, atol=1e-6)


def test_average_down_repeats_where_channels_grow_by_more_than_the_neighbourhood():
    x = normal(1, 1, 2, 2, 1)
    y = average_down(x, 8, (1, 2, 2))
    np.testing.assert_array_equal(y.reshape(-1), np.repeat(np.asarray(x).reshape(-1), 2))


@pytest.mark.parametrize("frames", [1, 3])
def test_repeat_up_gives_one_frame_for_the_first(frames):
    x = normal(1, frames, 1, 2, 4)
    y = repeat_up(x, 2, (2, 2, 2))
    assert y.shape == (1, 2 * frames - 1, 2, 4, 2)
    # A channel's 4 copies fill, in order time, row, column, half of an output channel's 8 places: the earlier
    # frame shows channels 0 and 2, the later 1 and 3. The earlier one of frame 0 is left out.
    for out_frame in range(2 * frames - 1):
        source, later = (out_frame + 1) // 2, (out_frame + 1) % 2
        expected = np.asarray(x)[0, source, :, :, later::2].repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(y[0, out_frame], expected)


def test_sampling_down_and_up_without_time():
    x = normal(1, 3, 4, 4, 2)
    y = average_down(x, 8, (1, 2, 2))
    assert y.shape == (1, 3, 2, 2, 8)
    np.testing.assert_array_equal(repeat_up(y, 2, (1, 2, 2)), x)
