import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.train import wavelets

haar = jax.jit(wavelets.haar, static_argnums=1)
wavelet_loss = jax.jit(wavelets.wavelet_loss, static_argnames="levels")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_one_level_is_sums_and_differences_of_neighbourhoods():
    video = noise(2, 4, 4, 6, 3)
    low, *high = (np.asarray(band) for band in (lambda b: (b[-1], *b[:-1]))(haar(jnp.asarray(video), 1)))
    blocks = video.astype(np.float64).reshape(2, 2, 2, 2, 2, 3, 2, 3)
    found = [low, *high]
    for index, band in enumerate(found):
        signs = [np.array([1.0, -1.0 if index >> bit & 1 else 1.0]) for bit in (2, 1, 0)]
        expected = np.einsum("btihjwkc,i,j,k->bthwc", blocks, *signs) / 8
        np.testing.assert_allclose(band, expected, atol=1e-6)


def test_the_transform_can_be_undone_and_levels_go_on_from_the_low_band():
    video = jnp.asarray(noise(1, 8, 8, 8, 2))
    two, one = haar(video, 2), haar(video, 1)
    assert len(two) == 15
    for a, b in zip(two, one[:7] + haar(one[7], 1), strict=True):
        np.testing.assert_array_equal(a, b)
    # Mean squares of orthogonal bands in units of the pixels: 8 coefficients stand for 8 pixels.
    power = 8 * sum(float(jnp.square(band).mean()) / 8 for band in one)
    assert power == pytest.approx(float(jnp.square(video).mean()), rel=1e-5)


@pytest.mark.parametrize("axis", [None, 1, 2, 3])
def test_an_error_in_one_band_counts_what_it_counts_in_l1(axis):
    """Even over all, or alternating along one axis."""
    error = np.full((1, 8, 16, 16, 3), 0.25, np.float32)
    if axis is not None:
        signs = np.resize([1, -1], error.shape[axis])
        error *= signs.reshape([-1 if i == axis else 1 for i in range(5)])
    a = jnp.asarray(noise(*error.shape))
    assert float(wavelet_loss(a + error, a, levels=3)) == pytest.approx(0.25, rel=1e-4)
    assert float(wavelet_loss(a, a, levels=3)) == 0.0


def test_an_image_counts_as_a_video_that_stands_still():
    a, b = jnp.asarray(noise(2, 1, 16, 16, 3)), jnp.asarray(noise(2, 1, 16, 16, 3, seed=1))
    still = wavelet_loss(jnp.repeat(a, 8, axis=1), jnp.repeat(b, 8, axis=1), levels=3)
    np.testing.assert_allclose(wavelet_loss(a, b, levels=3), still, rtol=1e-6)


def test_the_first_of_an_odd_number_of_frames_is_a_pair_of_its_own():
    video = noise(1, 5, 4, 4, 1)
    padded = np.concatenate([video[:, :1], video], axis=1)
    for a, b in zip(haar(jnp.asarray(video), 1), haar(jnp.asarray(padded), 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blur_and_flicker_cost_more_than_an_even_error_of_the_same_l1():
    a = jnp.asarray(noise(1, 8, 16, 16, 3))
    checker = np.indices((8, 16, 16)).sum(0) % 2 * 2.0 - 1.0
    half = checker * (np.arange(16)[None, None] < 8)
    even = wavelet_loss(a, a + 0.1, levels=2)
    mixed = wavelet_loss(a, a + 0.1 * jnp.asarray(half, jnp.float32)[None, ..., None] * 2, levels=2)
    assert float(mixed) == pytest.approx(float(even), rel=1e-4)  # each lies in one band
    rough = wavelet_loss(a, a + 0.1 * jnp.sign(jnp.asarray(noise(*a.shape, seed=3))), levels=2)
    assert float(rough) > 1.5 * float(even)


def test_gradient_is_finite_where_there_is_no_error():
    a = jnp.asarray(noise(1, 5, 8, 8, 3))
    assert np.isfinite(jax.jit(jax.grad(lambda x: wavelet_loss(x, a, levels=2)))(a)).all()
