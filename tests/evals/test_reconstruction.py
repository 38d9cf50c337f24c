"""Streamed scores against those of the whole video at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from vidgen.core import pixels
from vidgen.data.source import BrokenClip
from vidgen.evals import reconstruction
from vidgen.evals.frechet import Moments, frechet_distance
from vidgen.evals.quality import flicker, psnr, ssim
from vidgen.evals.reconstruction import RFVD, FeatureNetworks, VideoScorer, reconstruct_frames
from vidgen.evals.video_scores import VideoScores, format_scores, overall
from vidgen.models.lpips.model import LPIPS
from vidgen.models.video_vae.model import VideoVAE


@pytest.fixture(scope="module")
def vae():
    return random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def video():
    """Eight frames of 17 x 22: no 1 + 2 n, and no multiples of 4."""
    return np.random.default_rng(0).integers(0, 256, (8, 17, 22, 3), np.uint8)


@pytest.fixture(scope="module")
def whole(vae, video):
    filled = np.pad(video, ((0, 1), (0, 3), (0, 2), (0, 0)), mode="edge")
    run = jax.jit(lambda vae, video: pixels.to_uint8(vae.decode(vae.encode(pixels.to_float(video)))))
    return np.asarray(run(vae, filled[None]))[0, :8, :17, :22]


@pytest.mark.parametrize("group", [1, 3])
def test_pieces_are_those_of_the_whole_video(vae, video, whole, group):
    original, made = map(np.concatenate, zip(*reconstruct_frames(vae, video, group=group), strict=True))
    np.testing.assert_array_equal(original, video)
    # Sums in another order may round to the next level.
    assert np.abs(made.astype(int) - whole).max() <= 1 and (made != whole).mean() < 1e-3


def test_frames_are_taken_as_they_are_needed(vae, video):
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield video[0]

    pairs = reconstruct_frames(vae, endless())
    next(pairs)
    assert len(taken) == 1
    for _ in range(3):
        next(pairs)
    assert len(taken) == 7


def test_pixels_that_are_no_numbers_are_an_error(vae, video):
    broken = jax.tree.map(lambda x: x * jnp.nan, vae)
    with pytest.raises(ValueError, match="not finite"):
        list(reconstruct_frames(broken, video))


def watched(original, made, networks, cuts=(1, 2, 5)):
    scorer = VideoScorer("a", networks)
    list(scorer.watch(zip(np.split(original, cuts), np.split(made, cuts), strict=True)))
    return scorer


def test_scores_of_pieces_are_those_of_the_whole_video(video, whole):
    lpips = random_module(lambda: LPIPS(rngs=nnx.Rngs(0)))
    scores = watched(video, whole, FeatureNetworks(lpips=lpips)).scores()
    expected = [psnr(whole, video), ssim(whole, video), flicker(whole, video)]
    distance = jax.jit(
        lambda model, a, b: model(pixels.to_float(a), pixels.to_float(b)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    expected.append(distance(lpips, whole[None], video[None]))
    found = [scores.psnr, scores.ssim, scores.flicker, scores.lpips]
    np.testing.assert_allclose(found, [np.mean(values) for values in expected], rtol=1e-5)
    assert (scores.name, scores.num_frames) == ("a", 8)


def test_an_equal_video_is_perfect_and_an_image_has_no_flicker(video):
    scores = watched(video, video, FeatureNetworks()).scores()
    scores = dataclasses.replace(scores, ssim=round(scores.ssim, 12))
    assert scores == VideoScores(name="a", num_frames=8, psnr=100.0, ssim=1.0, flicker=0.0)
    assert watched(video[:1], video[:1], FeatureNetworks(), cuts=()).scores().flicker is None


def test_clips_of_rfvd_lie_end_to_end(video, monkeypatch):
    """With a network that gives each clip's mean colour."""
    monkeypatch.setattr(reconstruction, "_features", lambda _, clip: clip.mean((0, 1, 2))[None])
    original = np.random.default_rng(1).integers(0, 256, (30, 11, 11, 3), np.uint8)
    made = original // 2
    networks = FeatureNetworks(i3d=object.__new__(reconstruction.I3D), clip_frames=9)
    scorer = watched(original, made, networks, cuts=(1, 5, 8, 20, 27))
    assert scorer.rfvd.num_clips == 3
    moments = [Moments.of(v[:27].reshape(3, 9, 11, 11, 3).mean((1, 2, 3))) for v in (original, made)]
    assert scorer.rfvd.distance() == pytest.approx(frechet_distance(*moments), rel=1e-9)
    assert (RFVD() + scorer.rfvd + RFVD()).num_clips == 3
    with pytest.raises(ValueError, match="at least 2 clips; there are 0"):
        RFVD().distance()
    with pytest.raises(ValueError, match="clips of 8 frames: I3D needs at least 9"):
        FeatureNetworks(i3d=networks.i3d, clip_frames=8)


def test_videos_that_cannot_be_scored_are_broken():
    with pytest.raises(BrokenClip, match="a: it has no frames"):
        list(VideoScorer("a", FeatureNetworks()).watch(iter(())))
    small = np.zeros((1, 10, 30, 3), np.uint8)
    with pytest.raises(BrokenClip, match="10 x 30, to score them takes 11 x 11"):
        list(VideoScorer("a", FeatureNetworks()).watch(iter([(small, small)])))


def test_all_frames_count_evenly():
    scores = [
        VideoScores(name="long", num_frames=3, psnr=30.0, ssim=0.5, flicker=2.0),
        VideoScores(name="an image", num_frames=1, psnr=34.0, ssim=0.9),
        VideoScores(name="short", num_frames=2, psnr=28.0, ssim=0.6, flicker=5.0),
    ]
    total = overall(scores)
    assert total == pytest.approx(
        {"psnr": 180 / 6, "ssim": 3.6 / 6, "flicker": 9 / 3, "num_clips": 3, "num_frames": 6}
    )
    assert format_scores(scores, total).splitlines() == [
        "          frames  PSNR, dB    SSIM  flicker",
        "long           3     30.00  0.5000    2.000",
        "an image       1     34.00  0.9000        -",
        "short          2     28.00  0.6000    5.000",
        "all            6     30.00  0.6000    3.000",
    ]
