"""The Frechet distance against closed forms and scipy's square root of a matrix."""

import numpy as np
import pytest
from scipy import linalg

from vidgen.evals.frechet import Moments, frechet_distance


def moments(mean, covariance, count=10):
    covariance = np.asarray(covariance, np.float64)
    return Moments(count=count, mean=np.asarray(mean, np.float64), scatter=covariance * (count - 1))


def test_of_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    distance = frechet_distance(moments([1.0], [[9.0]]), moments([-1.0], [[4.0]]))
    assert distance == pytest.approx(4 + 1, rel=1e-12)


def test_of_commuting_covariances():
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    p, q, means = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.normal(size=(2, 6))
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(p) - np.sqrt(q)).sum()
    a, b = (moments(m, (axes * v) @ axes.T) for m, v in zip(means, (p, q), strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_against_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(40, 8)) + 0.5
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(c @ d).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c + d - 2 * root)
    a, b = Moments.of(x), Moments.of(y)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 5, 100])
def test_of_equal_sets_is_zero_also_with_fewer_clips_than_features(count):
    x = np.random.default_rng(2).normal(size=(count, 40)) * 10
    assert frechet_distance(Moments.of(x), Moments.of(x[::-1])) == pytest.approx(0, abs=1e-9)


def test_of_fewer_clips_than_features():
    """Two sets on two lines at right angles share nothing: the overlap is zero."""
    x, y = np.zeros((3, 40)), np.zeros((4, 40))
    x[:, 0], y[:, 1] = [-1, 0, 1], [-3, -1, 1, 3]
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(1 + 20 / 3, rel=1e-12)
    shifted = y + 2.0
    assert frechet_distance(Moments.of(y), Moments.of(shifted)) == pytest.approx(40 * 4, rel=1e-9)


def test_streamed_moments_are_those_of_all_at_once():
    x = np.random.default_rng(3).normal(size=(23, 5)) + 1e4
    parts = [Moments.of(part) for part in (x[:1], x[1:9], x[9:])]
    streamed = parts[0] + parts[1] + parts[2]
    assert streamed.count == 23
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(streamed.covariance, np.cov(x, rowvar=False), rtol=1e-8)


def test_errors():
    one, two = Moments.of(np.ones((1, 3))), Moments.of(np.eye(3)[:2])
    with pytest.raises(ValueError, match="at least 2 clips; there is 1"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="3 features, the other 4"):
        frechet_distance(two, Moments.of(np.ones((2, 4))))
    with pytest.raises(ValueError, match="1 of 2 features are not finite"):
        Moments.of(np.array([[0.0, 1.0], [np.nan, 1.0]]))
