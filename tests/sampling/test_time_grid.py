import numpy as np
import pytest

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


def test_grids_that_are_none():
    with pytest.raises(ValueError, match=r"num_steps=0: .* at least one step"):
        TimeGrid(num_steps=0)
    with pytest.raises(ValueError, match=r"shift=0\.0 must be positive"):
        TimeGrid(shift=0.0)


def test_a_shift_that_follows_the_size():
    grid = TimeGrid(num_steps=4, shift=RootShift(base_tokens=100))
    assert grid.for_tokens(900) == TimeGrid(num_steps=4, shift=3.0)
    assert TimeGrid(shift=2.0).for_tokens(900) == TimeGrid(shift=2.0)
    with pytest.raises(ValueError, match=r"use grid\.for_tokens"):
        grid.timesteps()
