"""`vidgen evaluate` of a VAE on a folder of videos."""

import json

import av
import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from vidgen.ckpt.weights import save_weights
from vidgen.cli import evaluate_vae
from vidgen.cli.main import main
from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.tree import named_leaves
from vidgen.data.video_io import read_clip, save_video
from vidgen.evals.quality import flicker, psnr, ssim
from vidgen.models.i3d.model import I3D
from vidgen.models.i3d.params import i3d_names
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import lpips_names
from vidgen.models.video_vae.diffusers_folder import save_diffusers
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.vae_folder import save_vae


@pytest.fixture(scope="module")
def vae():
    """With outputs so close to grey that H.264, which halves the resolution of colour, keeps them."""
    vae = random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)))
    vae.decoder.conv_out.kernel[...] *= 0.05
    vae.decoder.conv_out.bias[...] *= 0.05
    return vae


@pytest.fixture(scope="module")
def workdir(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_vae(vae, folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of 18 x 22, one of ten frames and one of nine, an image, and files that cannot be scored."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (10, 18, 22, 3), np.uint8) // 4 + 90
    save_video(folder / "a.mp4", smooth, fps=12)
    save_video(folder / "below" / "b.mp4", smooth[:9, ::-1], fps=12)
    save_video(folder / "c.png", smooth[:1], fps=1)
    save_video(folder / "small.mp4", smooth[:2, :8, :8], fps=12)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "a.txt").write_text("a caption")
    return folder


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def reconstruction(vae, video):
    """Of the whole video at once, filled to 1 + 2 n frames and multiples of 4."""
    frames, height, width = video.shape[:3]
    fill = ((0, (1 - frames) % 2), (0, -height % 4), (0, -width % 4), (0, 0))
    filled = np.pad(video, fill, mode="edge")
    run = jax.jit(lambda vae, video: pixels.to_uint8(vae.decode(vae.encode(pixels.to_float(video)))))
    return np.asarray(run(vae, filled[None]))[0, :frames, :height, :width]


def test_whole_videos_are_scored_and_what_cannot_be_is_named(vae, workdir, videos, tmp_path, capsys):
    file, beside = tmp_path / "scores.json", tmp_path / "beside"
    options = ["--videos", videos, "--json", file, "--side-by-side", beside]
    assert evaluate("--checkpoint", workdir, *options) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:5]] == ["a.mp4", "below/b.mp4", "c.png", "all"]
    assert any(line.startswith("skipped") and "small.mp4: its frames are 8 x 8" in line for line in out)
    scores = json.loads(file.read_text())
    assert (scores["num_clips"], scores["num_frames"], scores["step"]) == (3, 20, None)
    assert sorted(name.rsplit("/")[-1] for name in scores["skipped"]) == ["broken.mp4", "small.mp4"]
    for name, found in zip(("a.mp4", "below/b.mp4", "c.png"), scores["videos"], strict=True):
        original = read_clip(videos / name)
        made = reconstruction(vae, original)
        assert (found["name"], found["num_frames"]) == (name, len(original))
        np.testing.assert_allclose(found["psnr"], psnr(made, original).mean(), rtol=1e-4)
        np.testing.assert_allclose(found["ssim"], ssim(made, original).mean(), atol=1e-4)
        if len(original) > 1:
            np.testing.assert_allclose(found["flicker"], flicker(made, original).mean(), rtol=1e-4)
    assert scores["videos"][2]["flicker"] is None and scores["videos"][0]["lpips"] is None

    with av.open(str(beside / "below" / "b.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12.0
    pair = read_clip(beside / "a.mp4").astype(int)
    original = read_clip(videos / "a.mp4")
    assert pair.shape == (10, 18, 44, 3)
    made = reconstruction(vae, original)
    errors = np.abs(pair[:, :, :22] - original).mean(), np.abs(pair[:, :, 22:] - made).mean()
    assert max(errors) < 12 < np.abs(original.astype(int) - made).mean(), errors
    names = sorted(path.relative_to(beside).as_posix() for path in beside.rglob("*") if path.is_file())
    assert names == ["a.mp4", "below/b.mp4", "c.png.mp4"]


@pytest.mark.slow
def test_lpips_and_rfvd_with_weights(workdir, videos, tmp_path, capsys):
    options = ["--checkpoint", workdir, "--videos", videos, "--clip-frames", 9, "--json", tmp_path / "scores"]
    for kind, network, names in (
        ("lpips", LPIPS, lambda n: lpips_names(n, whole=True)),
        ("i3d", I3D, i3d_names),
    ):
        state = nnx.state(random_module(lambda network=network: network(rngs=nnx.Rngs(0))), graph=False)
        # Variances of this model are not those of `random_module`.
        state = jax.tree.map_with_path(lambda path, x: abs(x) if "variance" in str(path) else x, state)
        path = tmp_path / f"{kind}.safetensors"
        save_weights(path, state, names=names(named_leaves(state)))
        options += [f"--{kind}", path]
    assert evaluate(*options) == 0
    assert "rFVD" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores").read_text())
    assert scores["rfvd_clips"] == 2 and scores["rfvd"] > 0
    each = [video["lpips"] for video in scores["videos"]]
    assert np.average(each, weights=[10, 9, 1]) == pytest.approx(scores["lpips"])
    assert len(set(each)) == 3

    # One clip has no covariance: everything else is there all the same.
    (tmp_path / "scores").unlink()
    assert evaluate(*options, "--num-clips", 1) == 2
    assert "rFVD needs at least 2 clips of 9 frames, found 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "scores").read_text())["rfvd"] is None


def test_a_folder_of_diffusers_is_scored_alike(vae, workdir, videos, tmp_path):
    save_diffusers(vae, tmp_path / "wan" / "vae")
    found = []
    for checkpoint in (workdir, tmp_path / "wan", tmp_path / "wan" / "vae"):
        options = ["--videos", videos / "a.mp4", "--json", tmp_path / "scores", "--group", 2]
        assert evaluate("--checkpoint", checkpoint, *options) == 0
        found.append(json.loads((tmp_path / "scores").read_text())["psnr"])
    np.testing.assert_allclose(found[1:], found[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("not that"), "not that"),
        (OSError("no disk"), "no disk"),
        (RuntimeError("a defect"), "RuntimeError: a defect"),
    ],
)
def test_a_bad_file_does_not_cost_the_scores_of_the_others(
    workdir, videos, tmp_path, monkeypatch, capsys, error, reason
):
    """Whatever is raised, at whichever file."""
    opened = evaluate_vae._open_file

    def open_file(path, name, arguments):
        if name == "below/b.mp4":
            raise error
        return opened(path, name, arguments)

    monkeypatch.setattr(evaluate_vae, "_open_file", open_file)
    file = tmp_path / "scores.json"
    assert evaluate("--checkpoint", workdir, "--videos", videos, "--json", file) == 0
    scores = json.loads(file.read_text())
    assert [video["name"] for video in scores["videos"]] == ["a.mp4", "c.png"]
    assert scores["skipped"]["below/b.mp4"] == reason
    assert f"skipped below/b.mp4: {reason}" in capsys.readouterr().out


def test_frames_are_taken_at_the_size_and_rate_asked_for(workdir, videos, tmp_path):
    options = ["--videos", videos / "a.mp4", "--fps", 6, "--height", 12, "--width", 12]
    beside = tmp_path / "beside"
    assert evaluate("--checkpoint", workdir, *options, "--side-by-side", beside) == 0
    assert read_clip(beside / "a.mp4").shape == (5, 12, 24, 3)


def test_errors_name_what_is_wrong(workdir, videos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "lpips.safetensors").write_bytes(b"PK")
    for options, message in (
        (["--videos", videos / "broken.mp4"], "none of 1 videos could be scored"),
        (["--videos", videos / "broken.mp4"], "broken.mp4: "),
        (["--videos", "no/such"], "no/such: no such file or folder"),
        (["--videos", tmp_path / "empty"], "the folder holds no videos"),
        ([], "is a VAE without data of its own: give some with --videos"),
        (["--videos", videos, "--height", 16], "give both --height and --width"),
        (["--videos", videos, "--side-by-side", videos / "a.mp4"], "a.mp4 is a file: give a folder"),
        (["--videos", videos, "--side-by-side", videos / "new"], "is among the videos: give another folder"),
        (
            ["--videos", videos / "a.mp4", "--side-by-side", videos],
            "is among the videos: give another folder",
        ),
        (["--videos", videos, "--lpips", tmp_path / "lpips.safetensors"], "is no complete safetensors file"),
        (["--videos", videos, "--i3d", "i3d.safetensors"], "i3d.safetensors is missing"),
    ):
        assert evaluate("--checkpoint", workdir, *options, "--json", tmp_path / "scores") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "scores").exists() and not (videos / "new").exists()
