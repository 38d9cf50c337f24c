"""Options of a request take the place of the model's."""

import numpy as np
import pytest
from PIL import Image

from vidgen.core.errors import UserError
from vidgen.sampling.published import PUBLISHED
from vidgen.sampling.request import Request, fitted_pixels
from vidgen.sampling.steppers import DPMSolver, Heun, UniPC

DEFAULT = PUBLISHED["wan2.2-t2v-a14b"].options


def options(**fields):
    return Request(prompt="", **fields).options(DEFAULT)


def test_scales_and_conventions_that_depend_on_other_options():
    assert options() == DEFAULT

    def scales(**fields):
        return options(**fields).guidance_scale, options(**fields).guidance_scale_2

    assert scales() == (4.0, 3.0) and scales(steps=9) == (4.0, 3.0)
    assert scales(guidance_scale=6.0) == (6.0, None), "one scale is for both"
    assert scales(guidance_scale_2=2.0) == (4.0, 2.0)
    grid = lambda **fields: options(**fields).grid.convention  # noqa: E731
    assert grid(steps=9, stepper=UniPC()) == "wan" and grid(stepper=Heun()) == "even"
    assert grid(convention="unipc") == "unipc" and grid(stepper=DPMSolver(), convention="wan") == "wan"


def test_sides_that_are_not_given_are_those_of_the_model():
    assert Request(prompt="").size((9, 64, 32)) == (9, 64, 32)
    assert Request(prompt="", num_frames=1, width=48).size((9, 64, 32)) == (1, 64, 48)


def test_images_are_files_pictures_or_pixels(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    for image in (picture, Image.fromarray(picture), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(fitted_pixels(image), picture)
        assert fitted_pixels(image, (4, 4)).shape == (4, 4, 3)
    (tmp_path / "b.png").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"b\.png: cannot be decoded as an image"):
        fitted_pixels(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match=r"c\.png: there is no such image"):
        fitted_pixels(tmp_path / "c.png")
