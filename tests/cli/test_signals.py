"""A signal when a file or folder is written but does not yet have its name: the worst moment."""

import os
import pathlib
import signal

import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from vidgen.cli.main import main
from vidgen.data.video_io import save_video
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.vae_folder import save_vae


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder in which nothing gets its name: this process is sent the signal of `number` instead."""
    folder = tmp_path / "out"
    folder.mkdir()
    replace = os.replace

    def stopped(source, target, *arguments, **options):
        if folder in pathlib.Path(target).parents:
            assert pathlib.Path(source).exists()
            os.kill(os.getpid(), stopped.number)
        replace(source, target, *arguments, **options)

    stopped.number = signal.SIGTERM
    monkeypatch.setattr(os, "replace", stopped)
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield folder
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_vae(random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0))), folder)
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_encode_leaves_nothing_behind(out, workdir, tmp_path, capsys, number, status):
    os.replace.number = number
    clip = tmp_path / "clip.png"
    save_video(clip, np.zeros((1, 8, 8, 3), np.uint8), fps=12)
    assert main(["encode", str(clip), "--vae", str(workdir), "--out", str(out / "a.safetensors")]) == status
    assert list(out.iterdir()) == []
    assert capsys.readouterr().err.endswith({143: "terminated\n", 130: "interrupted\n"}[status])


def test_sample_leaves_nothing_behind(out, tiny_runs):
    arguments = ["--checkpoint", tiny_runs.dit, "--prompt", "a dog", "--steps", 2, "--num-frames", 1]
    assert main(["sample", *map(str, arguments), "--out", str(out / "a.mp4")]) == 143
    assert list(out.iterdir()) == []


def test_import_and_export_leave_nothing_behind(out, tiny_runs, tmp_path, monkeypatch):
    export = ["export", str(tiny_runs.dit), "--format", "diffusers", "--out"]
    assert main([*export, str(out / "there")]) == 143
    assert list(out.iterdir()) == []
    assert main([*export, str(tmp_path / "there")]) == 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        monkeypatch.setattr(os.replace, "number", number)
        assert main(["import", str(tmp_path / "there"), "--to", str(out / "here")]) == status
        assert list(out.iterdir()) == []
