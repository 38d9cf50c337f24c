"""PSNR, SSIM and flicker against their formulas, written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.evals.quality import evaluate_reconstruction, flicker, psnr, ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (2, 16, 19, 3), dtype=np.uint8)
    noise = rng.normal(0, 20, reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


def test_psnr_of_a_known_error():
    reference = np.full((3, 4, 12, 12, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(reference + np.uint8(5), reference), 20 * np.log10(255 / 5), rtol=1e-12)
    np.testing.assert_allclose(psnr(reference, reference), 100)
    assert psnr(reference, reference).shape == (3, 4)


def test_psnr_of_floats_is_that_of_bytes(pair):
    video, reference = pair
    np.testing.assert_allclose(psnr(video / 255, reference / 255), psnr(video, reference), rtol=1e-12)


def ssim_by_definition(a, b):
    """One channel; a loop over windows, with weighted moments about the window's own mean."""
    grid = np.arange(11) - 5
    weights = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11].astype(float), b[i : i + 11, j : j + 11].astype(float)
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_against_the_definition(pair):
    video, reference = pair
    expected = [
        np.mean([ssim_by_definition(v[..., c], r[..., c]) for c in range(3)])
        for v, r in zip(video, reference, strict=True)
    ]
    np.testing.assert_allclose(ssim(video, reference), expected, rtol=1e-9)


def test_ssim_of_equal_and_of_inverted_frames(pair):
    _, reference = pair
    np.testing.assert_allclose(ssim(reference, reference), 1, rtol=1e-12)
    assert ssim(255 - reference, reference).max() < 0


def test_ssim_names_frames_that_are_too_small():
    with pytest.raises(ValueError, match="10 x 12"):
        ssim(np.zeros((1, 10, 12, 3), np.uint8), np.zeros((1, 10, 12, 3), np.uint8))


def test_flicker_is_of_errors_that_change():
    rng = np.random.default_rng(2)
    reference = rng.integers(20, 236, (2, 5, 6, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(flicker(reference, reference), np.zeros((2, 4)))
    standing = reference + rng.integers(0, 20, (1, 1, 6, 7, 3), dtype=np.uint8)
    np.testing.assert_allclose(flicker(standing, reference), np.zeros((2, 4)), atol=1e-12)
    blinking = reference.copy()
    blinking[:, 2] += 8  # comes and goes: two changes of 8 levels
    np.testing.assert_allclose(flicker(blinking, reference), [[0, 8, 8, 0]] * 2, atol=1e-12)
    np.testing.assert_allclose(flicker(blinking / 255, reference / 255), [[0, 8, 8, 0]] * 2, atol=1e-12)
    frozen = np.repeat(reference[:, :1], 5, axis=1)
    changes = np.abs(np.diff(reference.astype(float), axis=1)).mean((2, 3, 4))
    np.testing.assert_allclose(flicker(frozen, reference), changes, rtol=1e-12)
    assert flicker(reference[:, :1], reference[:, :1]).shape == (2, 0)


def test_reconstruction_is_scored_in_bytes():
    rng = np.random.default_rng(1)
    batches = [rng.integers(10, 240, (n, 2, 16, 16, 3), dtype=np.uint8) for n in (2, 1)]
    exact = evaluate_reconstruction(lambda video: video + 0.3 / 127.5, batches)
    assert (
        exact["psnr"] == pytest.approx(100) and exact["ssim"] == pytest.approx(1) and exact["num_clips"] == 3
    )
    off = evaluate_reconstruction(lambda video: video + 4 / 127.5, batches)
    assert off["psnr"] == pytest.approx(20 * np.log10(255 / 4), rel=1e-6)
    assert 0.9 < off["ssim"] < 1


def test_reconstruction_errors():
    with pytest.raises(ValueError, match="no clips"):
        evaluate_reconstruction(lambda video: video, [])
    with pytest.raises(ValueError, match="same shape"):
        evaluate_reconstruction(
            lambda video: jnp.tile(video, (1, 2, 1, 1, 1)), [np.zeros((1, 1, 16, 16, 3), np.uint8)]
        )
