"""`vidgen data latents`, and training, evaluating and sampling on what it writes."""

import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.cli import data, evaluate, train
from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core import pixels
from vidgen.core.config import resolve
from vidgen.data.latents_records import LatentRecords
from vidgen.data.video_io import probe
from vidgen.models.video_vae.config import VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.pipeline import load
from vidgen.train.experiment import Experiment
from vidgen.train.vae_folder import load_vae, save_vae

CONFIG = str(pathlib.Path(__file__).parents[2] / "experiments" / "dit" / "sprites.py:packed,tiny")


@pytest.fixture(scope="module")
def packed(tiny_runs, tmp_path_factory):
    """Latents of the tiny experiment, and a run of four steps on them."""
    root = tmp_path_factory.mktemp("packed")
    latents, workdir = root / "latents", root / "dit"
    command = [
        "latents",
        f"--config={CONFIG}",
        f"--vae={tiny_runs.vae}",
        f"--out={latents}",
        "--num-clips=50",
    ]
    assert data.main(command) == 0
    options = [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.data.path={latents}",
        f"--config.task.vae={tiny_runs.vae}",
        "--config.run.num_steps=4",
        "--config.run.eval_every=4",
    ]
    assert train.main(options) == 0
    return types.SimpleNamespace(command=command, latents=latents, options=options, workdir=workdir)


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def test_latents_are_those_of_the_vae_and_shared_by_weight(packed, tiny_runs):
    records = LatentRecords(packed.latents)
    assert len(records) == 50 and records.sizes == [(1, 16, 32)] * 25 + [(5, 32, 16)] * 25
    assert records.info.vae == str(tiny_runs.vae) and records.info.fps == 8.0
    vae = load_vae(tiny_runs.vae)
    experiment = resolve(Experiment, load_config(CONFIG, []))
    sources = experiment.data.clips.bucket_sources()
    encode = jax.jit(lambda video: vae.encode(pixels.to_float(video)))
    for source, index in ((sources[0], 24), (sources[1], 49)):
        clip = records[index]
        original = source[int(clip["name"].rpartition("-")[2])]
        assert clip["caption"] == original["caption"] and clip["name"] == original["name"]
        expected = encode(original["video"][None])[0]
        assert clip["latents"].dtype == np.float16
        np.testing.assert_allclose(clip["latents"], expected, rtol=1e-3, atol=1e-4)
    drawn = [[records[index]["name"] for index in part] for part in (range(25), range(25, 50))]
    assert drawn[0] != drawn[1] and all(len(set(names)) == 25 for names in drawn)


def test_the_run_has_losses_and_previews_of_the_size_of_its_clips(packed):
    found = losses(packed.workdir)
    assert found.keys() == {1, 2, 3, 4}
    for line in found.values():
        assert np.isfinite(line["loss"]) and 0.7 < line["fill"] <= 1.0 and line["clips"] > 8
    (preview,) = (packed.workdir / "samples").glob("*.mp4")
    assert probe(preview).num_frames == 5


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(packed, tmp_path):
    shutil.copytree(packed.workdir, tmp_path / "dit")
    shutil.rmtree(tmp_path / "dit" / "checkpoints" / "4")
    assert train.main([*packed.options, f"--workdir={tmp_path / 'dit'}"]) == 0
    whole, resumed = losses(packed.workdir), losses(tmp_path / "dit")
    for step in (3, 4):
        assert [resumed[step][name] for name in ("loss", "grad_norm", "clips")] == [
            whole[step][name] for name in ("loss", "grad_norm", "clips")
        ]


@pytest.mark.slow
def test_it_is_evaluated_and_sampled_at_sizes_that_it_was_not_trained_on(packed, tmp_path):
    table = tmp_path / "table.json"
    options = ["--num-clips=2", "--batch-size=2", "--steps=2", f"--json={table}"]
    assert run(evaluate.main, [f"--checkpoint={packed.workdir}", *options]) == 0
    assert json.loads(table.read_text())["generated"]["num_clips"] == 2
    pipeline = load(packed.workdir)
    assert pipeline.size == (5, 16, 16)
    assert pipeline("a circle", num_frames=1, height=32, width=16, steps=2).shape == (1, 32, 16, 3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--config.data.packing.tokens_per_row=3",
            r"row is 3, and the clip sprites-0-\d+ \(5 x 32 x 16\) has 4 tokens: set it to 4 or more",
        ),
        ("--config.run.batch_size=12", r"config\.data: a batch of 12 rows \(rows\) does not divide"),
        ("--config.data.clips.height=24", r"config\.data, .*: height=24 is not a multiple of 16"),
        ("--config.data.path=nowhere", r"nowhere/latents\.json is missing: give a folder that `vidgen data"),
        (
            "--config.task.dit.in_channels=4",
            r"latents of 8 channels, and the transformer of config\.task\.dit takes 4",
        ),
        (
            "--config.task.dit.patch_size=(2,1,1)",
            r"the clip sprites-0-\d+ \(1 x 16 x 32\): latents of .* \(1, ",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_begins(packed, tmp_path, capsys, option, message):
    workdir = tmp_path / "w"
    assert run(train.main, [*packed.options, f"--workdir={workdir}", option]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1 and not workdir.exists()


def test_the_length_of_a_row_divides_over_the_mesh(packed, tmp_path, capsys):
    mesh = ["--config.mesh.context=8", "--config.mesh.data=1", "--config.data.packing.tokens_per_row=12"]
    assert run(train.main, [*packed.options, f"--workdir={tmp_path / 'w'}", *mesh]) == 2
    assert "context 8 does not divide: set it to 16" in capsys.readouterr().err


def test_latents_of_another_vae_are_refused(packed, tmp_path, capsys):
    other = random_module(lambda: VideoVAE(VARIANTS["tiny"], rngs=nnx.Rngs(0)), seed=5)
    save_vae(other, tmp_path / "other")
    options = [f"--workdir={tmp_path / 'w'}", f"--config.task.vae={tmp_path / 'other'}"]
    assert run(train.main, [*packed.options, *options]) == 2
    assert "which is another VAE than config.task.vae" in capsys.readouterr().err


def test_conditions_that_need_videos_are_refused(packed, tmp_path, capsys):
    task = {"conditioners": [{"kind": "concat_frames"}], "dit.in_channels": 20, "dit.out_channels": 8}
    options = [f"--config.task.{name}={value}" for name, value in task.items()]
    assert run(train.main, [*packed.options, f"--workdir={tmp_path / 'w'}", *options]) == 2
    error = capsys.readouterr().err
    assert "needs videos" in error and "config.task.conditioners" in error


def test_a_vae_is_not_trained_on_latents(packed, tmp_path, capsys):
    options = [f"--workdir={tmp_path / 'w'}", "--config.task={'kind': 'vae'}"]
    assert run(train.main, [*packed.options[:1], *packed.options[2:3], *options]) == 2
    assert "only a task of text_to_video is trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "is there already"),
        (["--num-clips=0", "--out=new"], "--num-clips: found 0"),
        (
            ["--num-clips=1", "--out=new"],
            "1 clips are 0 of the size 1 x 16 x 32, of which there are 64: take more",
        ),
        (
            ["--num-clips=999", "--out=new"],
            "are 500 of the size 1 x 16 x 32, of which there are 64: take fewer",
        ),
        (["--config.data.clips.height=x", "--out=new"], "expected int"),
        (["--vae=nowhere", "--out=new"], "nowhere/vae holds no VAE"),
    ],
)
def test_wrong_commands_are_one_line(packed, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    assert data.main([*packed.command, *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vidgen data: ")
    assert not list(tmp_path.iterdir())
