import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.cli.main import main
from vidgen.evals.previews import grid, reconstruct
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.train.experiment import load_experiment
from vidgen.train.vae_folder import load_vae


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def test_a_vae_is_scored_by_its_reconstructions(tiny_runs, tmp_path, capsys):
    file = tmp_path / "scores.json"
    assert evaluate("--checkpoint", tiny_runs.vae, "--num-clips", 5, "--json", file) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads(lines[-1])
    videos = json.loads(file.read_text()).pop("videos")
    assert scores | {"videos": videos} == json.loads(file.read_text())
    assert (scores["checkpoint"], scores["step"], scores["num_clips"]) == (str(tiny_runs.vae), 2, 5)
    assert scores["num_frames"] == 25 and scores["skipped"] == {} and len(videos) == len(lines) - 3 == 5

    # Again with the averaged weights that the run left in its folder; all five clips count, evenly.
    source = load_experiment(tiny_runs.vae).data.clips.heldout().source()
    clips = np.stack([source[index]["video"] for index in range(5)])
    pixels = jnp.asarray(clips, jnp.float32) / 127.5 - 1
    vae = load_vae(tiny_runs.vae)
    vae = jax.device_put(vae, shardings(vae, MeshOptions().build()))
    made = np.rint((np.clip(reconstruct(vae, pixels), -1, 1) + 1) * 127.5)
    errors = np.square(made - clips).mean((2, 3, 4))
    np.testing.assert_allclose(scores["psnr"], (10 * np.log10(255**2 / errors)).mean(), rtol=1e-3)
    changes = np.abs(np.diff(made - clips, axis=1)).mean((1, 2, 3, 4))
    np.testing.assert_allclose([video["flicker"] for video in videos], changes, rtol=1e-3)
    assert [video["name"] for video in videos] == [source[index]["name"] for index in range(5)]
    assert -1 <= scores["ssim"] <= 1


def test_a_video_model_is_scored_by_its_alignment(tiny_runs, capsys):
    assert evaluate("--checkpoint", tiny_runs.dit, "--num-clips", 3, "--batch-size", 2, "--steps", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads(lines[-1])
    assert "generated" in lines and "real" in lines
    assert scores["step"] == 2
    assert scores["generated"]["num_clips"] == scores["real"]["num_clips"] == 3
    assert scores["real"].keys() == scores["generated"].keys() >= {"colour", "shape", "all"}
    assert all(0 <= scores["generated"][name] <= 1 for name in ("colour", "shape", "all"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "."], ". is a folder: give the name of a file"),
        (["--fps", "8"], "--fps is for --videos"),
        (["--checkpoint", "no/such/run"], "no/such/run is not the workdir of a training run"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate("--checkpoint", "x", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "argument",
    [
        "--num-clips=0",
        "--batch-size=0",
        "--fps=nan",
        "--height=1000000",
        "--clip-frames=0",
        "--steps=0",
        "--seed=-1",
    ],
)
def test_numbers_out_of_range(capsys, argument):
    with pytest.raises(SystemExit) as stopped:
        evaluate("--checkpoint", "x", argument)
    assert stopped.value.code == 2
    assert f"argument {argument.split('=')[0]}: found" in capsys.readouterr().err


def test_options_for_another_kind_of_run_are_errors(tiny_runs, tmp_path, capsys):
    assert evaluate("--checkpoint", tiny_runs.dit, "--lpips", "lpips.safetensors") == 2
    assert "is no VAE: --lpips is for a VAE's reconstructions" in capsys.readouterr().err
    assert evaluate("--checkpoint", tiny_runs.vae, "--i3d", "i3d.safetensors") == 2
    assert "held-out clips have 5 frames" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate("--help")
    assert stopped.value.code == 0 and "--num-clips" in capsys.readouterr().out


def test_a_grid_is_as_square_as_it_gets_and_keeps_the_order():
    clips = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1, 1) * np.ones((5, 2, 3, 4, 3), np.uint8)
    image = grid(clips)
    assert image.shape == (2, 6, 12, 3)
    assert image[1, ::3, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
