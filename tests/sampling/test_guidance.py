import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.core.config import resolve
from vidgen.core.errors import UserError
from vidgen.sampling.guidance import (
    GUIDANCES,
    AdaptiveProjected,
    AnyGuidance,
    ClassifierFree,
    Guidance,
    ZeroStar,
)

SHAPE = (2, 2, 3, 4, 5)
RANDOM = np.random.default_rng(0)
POSITIVE, NEGATIVE, LATENTS = (
    jnp.asarray(RANDOM.normal(size=SHAPE) * size, jnp.float32) for size in (1.0, 0.7, 1.3)
)
TIMESTEP = jnp.asarray([0.9, 0.4])
T = TIMESTEP.reshape(2, 1, 1, 1, 1)


def combine(guidance, scale, positive=POSITIVE, negative=NEGATIVE, timestep=TIMESTEP, state=None, step=5):
    state = guidance.init(positive) if state is None else state
    return guidance.combine(
        positive,
        negative,
        latents=LATENTS,
        timestep=timestep,
        scale=scale,
        state=state,
        step=jnp.asarray(step),
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_velocity_is_extrapolated_from_negative_to_positive(scale):
    guided, _ = combine(ClassifierFree(), scale)
    np.testing.assert_allclose(guided, NEGATIVE + scale * (POSITIVE - NEGATIVE), rtol=1e-6)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=str)
def test_scale_1_is_the_model_under_the_prompt(guidance):
    assert isinstance(guidance, Guidance)
    assert resolve(AnyGuidance, {"kind": guidance.kind}) == guidance
    np.testing.assert_allclose(combine(guidance, 1.0)[0], POSITIVE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=str)
def test_each_clip_is_its_own(guidance):
    both, _ = combine(guidance, 3.0)
    alone, _ = guidance.combine(
        POSITIVE[1:],
        NEGATIVE[1:],
        latents=LATENTS[1:],
        timestep=TIMESTEP[1:],
        scale=3.0,
        state=guidance.init(POSITIVE[1:]),
        step=jnp.asarray(5),
    )
    np.testing.assert_allclose(alone, both[1:], rtol=1e-5, atol=1e-6)


def test_rescaling_brings_the_deviation_back():
    whole, none, half = (combine(ClassifierFree(rescale=r), 6.0)[0] for r in (1.0, 0.0, 0.5))
    np.testing.assert_allclose(whole.std((1, 2, 3, 4)), POSITIVE.std((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(half, (whole + none) / 2, rtol=1e-5, atol=1e-6)


def test_zero_star_fits_the_negative_velocity_by_least_squares():
    """A negative velocity that is a multiple of the positive one has nothing to lead away from."""
    np.testing.assert_allclose(
        combine(ZeroStar(), 7.0, negative=0.3 * POSITIVE)[0], POSITIVE, rtol=1e-4, atol=1e-5
    )
    for step, still in ((0, True), (1, True), (2, False)):
        assert (combine(ZeroStar(zero_steps=2), 7.0, step=step)[0] == 0.0).all() == still


def test_projected_guidance_changes_the_clean_prediction_across_itself():
    clean = np.asarray(LATENTS - T * POSITIVE, np.float64)
    guided, _ = combine(AdaptiveProjected(), 5.0)
    change = np.asarray(LATENTS - T * guided, np.float64) - clean
    for a, b in zip(change, clean, strict=True):
        assert abs((a * b).sum()) < 1e-5 * np.linalg.norm(a) * np.linalg.norm(b)
    # With all of the part along it, and nothing remembered, it is plain guidance.
    plain = combine(AdaptiveProjected(eta=1.0), 5.0)[0]
    np.testing.assert_allclose(plain, combine(ClassifierFree(), 5.0)[0], rtol=1e-4, atol=1e-5)


def test_a_projected_change_is_no_longer_than_the_threshold():
    guided, _ = combine(AdaptiveProjected(eta=1.0, norm_threshold=0.25), 5.0)
    change = np.asarray(T * (POSITIVE - guided))
    np.testing.assert_allclose(np.sqrt((change**2).sum((1, 2, 3, 4))), 4.0 * 0.25, rtol=1e-4)


def test_projected_guidance_at_the_end_of_time():
    """Its limit where t = 0, whatever is remembered: no division by zero."""
    guidance = AdaptiveProjected(eta=1.0, norm_threshold=15.0)
    _, state = combine(guidance, 5.0)
    guided, _ = combine(guidance, 5.0, timestep=jnp.zeros(2), state=state)
    np.testing.assert_allclose(guided, combine(ClassifierFree(), 5.0)[0], rtol=1e-5, atol=1e-6)


GIVEN = jnp.zeros((2, 2, 3, 4, 1), bool).at[:, 0].set(True)
ALL = [*GUIDANCES.values(), ClassifierFree(rescale=0.7), AdaptiveProjected(norm_threshold=0.5)]


def two_steps(guidance, positive, negative, latents, where):
    """The guided velocity of the second of two steps: what is kept between them counts too."""
    state = guidance.init(positive)
    for step, t in enumerate((0.9, 0.4), start=5):
        guided, state = guidance.combine(
            positive,
            negative,
            latents=latents,
            timestep=jnp.full(len(positive), t),
            scale=5.0,
            state=state,
            step=jnp.asarray(step),
            where=where,
        )
    return guided


@pytest.mark.parametrize("guidance", ALL, ids=str)
def test_frames_that_are_given_change_nothing_of_the_others(guidance):
    """The network's output there is never trained."""
    inputs = (POSITIVE, NEGATIVE, LATENTS)
    alone = two_steps(guidance, *(x[:, 1:] for x in inputs), None)
    noisy = [x + 30.0 * GIVEN * RANDOM.normal(size=x.shape).astype(np.float32) for x in inputs]
    guided = two_steps(guidance, *noisy, ~GIVEN)
    np.testing.assert_allclose(guided[:, 1:], alone, rtol=1e-5, atol=1e-5)
    assert (guided[:, 0] == 0.0).all() and jnp.abs(alone).min() > 0


@pytest.mark.parametrize("where", [None, ~GIVEN, GIVEN & False], ids=["all", "some", "none"])
@pytest.mark.parametrize("guidance", ALL, ids=str)
def test_a_network_that_says_nothing_yet_is_no_division_by_zero(guidance, where):
    """The velocity of a fresh model whose last layer is zero."""
    still = jnp.zeros(SHAPE)
    assert (two_steps(guidance, still, still, LATENTS, where) == 0.0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        (ClassifierFree, {"rescale": 1.5}),
        (ZeroStar, {"zero_steps": -1}),
        (AdaptiveProjected, {"norm_threshold": 0.0}),
        (AdaptiveProjected, {"momentum": float("nan")}),
    ],
)
def test_options_out_of_range(wrong):
    guidance, options = wrong
    with pytest.raises(UserError, match=next(iter(options))):
        guidance(**options)
