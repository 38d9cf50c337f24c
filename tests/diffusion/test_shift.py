import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.diffusion.shift import GeometricShift, RootShift, Shift, shift_at, shift_timestep


def test_shift_keeps_the_ends_and_moves_the_middle_to_noise():
    t = jnp.asarray([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_array_equal(shift_timestep(t, 1.0), t)
    np.testing.assert_allclose(shift_timestep(t, 3.0), [0.0, 0.5, 0.75, 1.0], rtol=1e-6)
    # The ratio of noise to signal grows by the factor `shift`.
    inner = np.asarray(shift_timestep(t, 7.0))[1:3]
    np.testing.assert_allclose(inner / (1 - inner), 7.0 * np.array([1 / 3, 1.0]), rtol=1e-5)


def test_a_constant_image_is_destroyed_as_far_at_every_size():
    """What the square root stands for: a mean of n pixels at t has the deviation t / ((1 - t) sqrt(n))."""
    t, shift = 0.3, RootShift(base_tokens=64)
    for num_tokens in (16, 64, 4096):
        moved = float(shift_timestep(jnp.asarray(t), shift.at(num_tokens)))
        deviation = moved / (1 - moved) / math.sqrt(num_tokens)
        assert deviation == pytest.approx(t / (1 - t) / 8.0, rel=1e-6)


def test_values_of_flux():
    shift = GeometricShift()
    for num_tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825), (8192, 1.15 + 0.65 * 4096 / 3840)):
        assert math.log(shift.at(num_tokens)) == pytest.approx(mu, rel=1e-12)


@pytest.mark.parametrize("shift", [RootShift(base_tokens=50, base_shift=1.5), GeometricShift()], ids=str)
def test_numbers_and_arrays_of_sizes(shift):
    assert isinstance(shift, Shift)
    sizes = [10, 256, 9000]
    found = jax.jit(lambda n: shift_at(shift, n))(jnp.asarray(sizes))
    np.testing.assert_allclose(found, [shift.at(n) for n in sizes], rtol=1e-5)
    assert isinstance(shift.at(10), float) and shift_at(2.5, 10) == 2.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RootShift(base_tokens=0), "base_tokens=0 must be positive"),
        (lambda: GeometricShift(max_shift=-1.0), r"max_shift=-1\.0 must be positive"),
        (lambda: GeometricShift(max_tokens=256), "max_tokens=256 must be above base_tokens=256"),
    ],
)
def test_shifts_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()
