import numpy as np
import pytest

from vidgen.core.config import ConfigError, resolve
from vidgen.core.errors import UserError
from vidgen.diffusion.shift import RootShift
from vidgen.sampling.time_grid import TimeGrid


def test_even_and_shifted():
    assert TimeGrid(num_steps=4).timesteps().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = TimeGrid(num_steps=4, shift=3.0).timesteps()
    assert shifted.dtype == np.float32
    np.testing.assert_allclose(shifted, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 12.0])
def test_from_noise_to_data_strictly(shift):
    t = TimeGrid(num_steps=50, shift=shift).timesteps()
    assert len(t) == 51 and t[0] == 1.0 and t[-1] == 0.0 and (np.diff(t) < 0).all()


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_numbers_of_steps_that_are_none(num_steps):
    with pytest.raises(UserError, match=r"num_steps: found .*, expected a whole number from 1 to 1,000"):
        TimeGrid(num_steps=num_steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_shifts_that_are_none(shift):
    with pytest.raises(UserError, match=r"shift: found .*, expected a number from 0\.001 to 1,000"):
        TimeGrid(shift=shift)
    with pytest.raises(ConfigError, match=r"grid\.shift: found .*, expected a number from 0\.001 to 1,000"):
        resolve(TimeGrid, {"shift": shift}, where="grid")


WAN_TOLD = """
    999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843
    833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92
"""
"""Timesteps of `FlowUniPCMultistepScheduler` for 50 steps and a shift of 5, by running Wan's own program."""


def test_wans_own_timesteps():
    grid = TimeGrid(num_steps=50, shift=5.0, convention="wan")
    told = np.rint(1000 * grid.model_timesteps()[:-1])
    assert told.tolist() == [float(t) for t in WAN_TOLD.split()]
    # Sigma of step k: 0.999 (1 - k / n), shifted, and 0 at the end.
    even = 0.999 * (1 - np.arange(51) / 50)
    np.testing.assert_allclose(grid.timesteps(), 5 * even / (1 + 4 * even), rtol=1e-6)
    # diffusers' scheduler of the same name visits others.
    other = np.rint(1000 * TimeGrid(num_steps=50, shift=5.0, convention="unipc").model_timesteps()[:-1])
    assert ((other != told).sum(), np.abs(other - told).max()) == (27, 4)
    # Its first timestep is kept in float32: two thirds of it are 0.666 and a little.
    three = TimeGrid(num_steps=3, convention="wan").model_timesteps()
    assert np.rint(1000 * three).tolist() == [999, 666, 333, 0]


def test_no_shift_is_1():
    assert TimeGrid(num_steps=4).for_tokens(9) == TimeGrid(num_steps=4, shift=1.0)
    np.testing.assert_array_equal(
        TimeGrid(num_steps=4).timesteps(), TimeGrid(num_steps=4, shift=1.0).timesteps()
    )


def test_a_shift_that_follows_the_size():
    grid = TimeGrid(num_steps=4, shift=RootShift(base_tokens=100))
    assert grid.for_tokens(900) == TimeGrid(num_steps=4, shift=3.0)
    assert TimeGrid(shift=2.0).for_tokens(900) == TimeGrid(shift=2.0)
    with pytest.raises(ValueError, match=r"use grid\.for_tokens"):
        grid.timesteps()
