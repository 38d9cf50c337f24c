"""A trained run as a function from prompt to video. What sampling does is tested in tests/sampling."""

import shutil

import jax
import numpy as np
import pytest

import vidgen
from vidgen.models.text.tokenizer import PromptTooLong
from vidgen.parallel.mesh import MeshOptions
from vidgen.sampling.steppers import Euler, UniPC

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def pipe(tiny_runs):
    return vidgen.load(tiny_runs.dit)


@pytest.fixture(scope="module")
def video(pipe):
    return pipe(PROMPT, seed=3, steps=2)


def test_a_prompt_gives_a_video_of_the_size_of_training(pipe, video):
    assert (pipe.size, pipe.fps) == ((5, 16, 16), 8.0)
    assert video.shape == (5, 16, 16, 3) and video.dtype == np.uint8 and video.std() > 1


def test_the_seed_decides(pipe, video):
    np.testing.assert_array_equal(pipe(PROMPT, seed=3, steps=2), video)
    assert np.abs(pipe(PROMPT, seed=4, steps=2).astype(int) - video).max() > 5


def test_several_prompts_are_seeded_one_after_the_other(pipe, video):
    videos = pipe(["a blue square", PROMPT], seed=2, steps=2)
    assert videos.shape == (2, 5, 16, 16, 3)
    assert np.abs(videos[1].astype(int) - video).max() <= 1


def test_one_device_makes_the_same_video_as_eight(tiny_runs, pipe, video):
    single = vidgen.load(tiny_runs.dit, mesh=MeshOptions().build(jax.devices()[:1]))
    assert (single.mesh.size, pipe.mesh.size) == (1, 8)
    assert np.abs(single(PROMPT, seed=3, steps=2).astype(int) - video).max() <= 1


def test_images_and_other_steppers(pipe):
    image = pipe(PROMPT, num_frames=1, steps=1, stepper=Euler())
    assert image.shape == (1, 16, 16, 3)
    clip = pipe(PROMPT, steps=3, stepper=UniPC())
    assert clip.shape == (5, 16, 16, 3) and clip.std() > 0


def test_weights_are_those_of_the_checkpoint(tiny_runs, pipe):
    from vidgen.train.restore import load_run

    _, step, model = load_run(tiny_runs.dit, pipe.mesh)
    assert step == 2
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), model, pipe.model)
    assert all(jax.tree.leaves(equal))


def test_sizes_and_prompts_that_do_not_fit(pipe):
    with pytest.raises(ValueError, match=r"num_frames=6 is not 1 \+ 4 n; use 5 or 9"):
        pipe(PROMPT, num_frames=6)
    with pytest.raises(ValueError, match="height=20 is not a multiple of 16; use 16 or 32"):
        pipe(PROMPT, height=20)
    with pytest.raises(ValueError, match="width=24 is not a multiple of 16; use 16 or 32"):
        pipe(PROMPT, width=24)
    with pytest.raises(PromptTooLong, match="has 97 bytes, the text encoder takes 96"):
        pipe("x" * 97)


def test_a_run_stands_alone_and_can_be_moved(tiny_runs, tmp_path, video):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_runs.dit, moved)
    np.testing.assert_array_equal(vidgen.load(moved)(PROMPT, seed=3, steps=2), video)


def test_folders_that_are_no_run_of_a_video_model(tiny_runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: .* not the workdir"):
        vidgen.load(tmp_path)
    with pytest.raises(ValueError, match="a run of kind 'vae'; give one of kind 'text_to_video'"):
        vidgen.load(tiny_runs.vae)
    alone = tmp_path / "dit"
    shutil.copytree(tiny_runs.dit, alone, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(FileNotFoundError, match="holds no VAE"):
        vidgen.load(alone)
