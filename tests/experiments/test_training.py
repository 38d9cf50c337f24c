"""Every experiment trains two steps as ":tiny" through the command."""

import importlib
import json
import math
import pathlib

import numpy as np
import pytest

from tests.train_command import train_command
from vidgen.data.video_io import save_video
from vidgen.train.vae_folder import has_vae

ROOT = pathlib.Path(__file__).parents[2]
PATHS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "experiments").glob("*/*.py")
    if not path.name.startswith("_")
)
PATHS.remove("experiments/dit/wan.py")  # test_recipes.py trains it.
SLOW = (
    "experiments/dit/t2v_1b.py",
    "experiments/vae/finetune.py",
    "experiments/vae/folder.py",
    "experiments/vae/wan.py",
)
"""Other tests have their parts: bfloat16, remat, the adversary; folder.py has a test of its own."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for index in range(2):
        frames = rng.integers(0, 256, (200, 24, 32, 3), dtype=np.uint8)
        save_video(folder / f"{index}.mp4", frames, fps=8.0)
        (folder / f"{index}.txt").write_text(f"noise number {index}")
    return folder


def train(path, workdir, overrides, argument="tiny"):
    options = [f"--config.{key}={value}" for key, value in overrides.items()]
    train_command(f"{ROOT / path}:{argument}", workdir, *options)


def test_images_and_clips_of_several_sizes_by_turns(tmp_path, videos):
    save_video(videos / "image.png", np.full((1, 40, 40, 3), 90, np.uint8), fps=1)
    overrides = {"data.path": videos, "run.num_steps": 4, "run.eval_every": 4}
    train("experiments/vae/folder.py", tmp_path, overrides, "mixed,tiny")

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    state = json.loads((tmp_path / "config.json").read_text())["data"]["buckets"]
    assert [bucket["num_frames"] for bucket in state] == [1, 5]
    assert has_vae(tmp_path) and list((tmp_path / "samples").glob("*.mp4"))


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else []) for path in PATHS]
)
def test_two_steps(path, tmp_path, videos, tiny_runs):
    config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config("tiny")
    overrides = {}
    if config.data.kind == "folder":
        overrides["data.path"] = videos
    if config.task.kind == "text_to_video":
        overrides["task.vae"] = tiny_runs.vae
    trained = {"experiments/vae/sprites.py": tiny_runs.vae, "experiments/dit/sprites.py": tiny_runs.dit}
    workdir = trained.get(path, tmp_path)
    if path not in trained:
        train(path, workdir, overrides)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses.keys() == {1, 2}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert (workdir / "checkpoints" / "2").is_dir()
    assert (workdir / "vae" / "model.safetensors").exists()
    assert list((workdir / "samples").glob("*.mp4"))
