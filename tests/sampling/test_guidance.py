import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.sampling.guidance import classifier_free_guidance

X, T = jnp.arange(4.0).reshape(2, 1, 1, 2, 1), jnp.asarray([0.2, 0.6])
POSITIVE = {"text": jnp.asarray([1.0, 2.0]), "mask": jnp.asarray([True, False])}
NEGATIVE = {"text": jnp.asarray([-3.0, 5.0]), "mask": jnp.asarray([True, True])}


def network(x, t, condition):
    assert condition["mask"].dtype == bool
    wide = lambda v: v.reshape(-1, 1, 1, 1, 1)  # noqa: E731
    return x * wide(condition["text"]) + wide(t) + wide(condition["mask"])


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_velocity_is_extrapolated_from_negative_to_positive(scale):
    guided = classifier_free_guidance(network, POSITIVE, NEGATIVE, scale)(X, T)
    positive, negative = network(X, T, POSITIVE), network(X, T, NEGATIVE)
    np.testing.assert_allclose(guided, negative + scale * (positive - negative), rtol=1e-6)
    if scale == 1.0:
        np.testing.assert_allclose(guided, positive, rtol=1e-6)


def test_one_network_call_of_twice_the_batch():
    calls = []

    def counted(x, t, condition):
        calls.append((x.shape, t.tolist()))
        return network(x, t, condition)

    classifier_free_guidance(counted, POSITIVE, NEGATIVE, 2.0)(X, T)
    assert calls == [((4, 1, 1, 2, 1), pytest.approx([0.2, 0.6, 0.2, 0.6]))]
