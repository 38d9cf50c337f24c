"""Files as people have them, through every command that reads them: what works, and how the rest is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.data.conftest import write_frames
from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from vidgen.cli.main import main
from vidgen.core import pixels
from vidgen.data.latents_file import load_latents
from vidgen.data.video_io import read_clip
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train import loop
from vidgen.train.vae_folder import load_vae, save_vae

SHOWN = {
    "odd.mkv": (4, 11, 19),
    "one.mp4": (1, 12, 20),
    "deep.mp4": (4, 12, 20),
    "turned.mp4": (4, 12, 20),
    "clear.png": (1, 12, 20),
    "clear.mov": (4, 12, 20),
    "float.tiff": (1, 12, 20),
}
"""Frames and size of each file as it is shown; the VAE sees all of them as 12 x 20."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_vae(random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0))), folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    noise = lambda *shape: list(rng.integers(0, 256, shape, np.uint8))  # noqa: E731
    write_frames(folder / "odd.mkv", noise(4, 11, 19, 3), codec="ffv1", pix_fmt="yuv444p")
    write_frames(folder / "one.mp4", noise(1, 12, 20, 3))
    write_frames(folder / "deep.mp4", noise(4, 12, 20, 3), pix_fmt="yuv420p10le")
    write_frames(folder / "turned.mp4", noise(4, 20, 12, 3), rotation=90)
    Image.fromarray(noise(1, 12, 20, 4)[0]).save(folder / "clear.png")
    write_frames(folder / "clear.mov", noise(4, 12, 20, 4), codec="png", pix_fmt="rgba", source_format="rgba")
    Image.fromarray(rng.random((12, 20), np.float32)).save(folder / "float.tiff")
    assert {path.name for path in folder.iterdir()} == SHOWN.keys()
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A picture and a video of floating point numbers, one of which is none."""
    folder = tmp_path_factory.mktemp("broken")
    picture = np.full((12, 20), 0.5, np.float32)
    picture[7, 3] = np.nan
    Image.fromarray(picture).save(folder / "nan.tiff")
    video = np.full((3, 12, 20, 3), 0.5, np.float32)
    video[1, 7, 3] = np.inf
    keywords = {"fps": 4, "codec": "rawvideo", "pix_fmt": "gbrpf32le", "source_format": "gbrpf32le"}
    write_frames(folder / "nan.nut", list(video), **keywords)
    return folder


@pytest.mark.parametrize("name", SHOWN)
def test_encoded_and_decoded_it_keeps_its_frames_and_size(files, workdir, tmp_path, name):
    frames, height, width = SHOWN[name]
    latents, out = tmp_path / "a.safetensors", tmp_path / "a.gif"
    assert main(["encode", str(files / name), "--vae", str(workdir), "--out", str(latents)]) == 0
    found, info = load_latents(latents)
    assert (info.num_frames, info.height, info.width) == SHOWN[name]
    assert found.shape == (3 if frames == 4 else 1, 3, 5, 3)
    seen = read_clip(files / name)
    assert seen.shape == (frames, height, width, 3) and seen.std() > 20
    filled = np.pad(seen, ((0, frames // 4), (0, 12 - height), (0, 20 - width), (0, 0)), mode="edge")
    expected = jax.jit(lambda vae, video: vae.encode(pixels.to_float(video)))(load_vae(workdir), filled[None])
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)
    assert main(["decode", str(latents), "--out", str(out)]) == 0
    assert read_clip(out).shape == (frames, height, width, 3)


def test_an_mp4_of_odd_size_is_made_even(files, workdir, tmp_path):
    latents = tmp_path / "a.safetensors"
    assert main(["encode", str(files / "odd.mkv"), "--vae", str(workdir), "--out", str(latents)]) == 0
    assert main(["decode", str(latents), "--out", str(tmp_path / "a.mp4")]) == 0
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.shape == (4, 12, 20, 3)


def test_data_check_uses_them_and_names_what_is_not_finite(files, broken, capsys):
    assert main(["data", "check", str(files), "--num-frames=1", "--height=12", "--width=20"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("used")] == sorted(
        SHOWN
    )
    assert "turned.mp4: 1 clips; 20x12" in out and "shown turned by 270 degrees" in out
    assert main(["data", "check", str(broken), "--num-frames=1"]) == 1
    out = capsys.readouterr().out
    assert "NOT USED  nan.nut: pixels are not finite at 0.250 s" in out
    assert (
        "nan.tiff: cannot be decoded as an image: pixels are not finite, the first in row 7, column 3" in out
    )


@pytest.fixture
def drawn(monkeypatch):
    """Batches that training draws, in the place of training."""
    batches = []
    monkeypatch.setattr(
        loop,
        "fit",
        lambda **a: batches.extend((next(a["loader"]), dict(a["loader"].broken)) for _ in range(8)),
    )
    return batches


def train(path, tmp_path, *options):
    config = tmp_path / "experiment.py"
    config.write_text(
        f"""
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.task = dict(kind="vae", model=dict(base_dim=8, latent_channels=4))
    config.data = dict(kind="folder", path={str(path)!r}, num_frames=1, height=16, width=16, fps=25.0)
    config.run = dict(batch_size=8)
    return config
"""
    )
    return main(["train", f"--config={config}", f"--workdir={tmp_path / 'w'}", *options])


def test_training_takes_them(files, tmp_path, drawn):
    buckets = "[{'height': 16, 'width': 24}, {'num_frames': 5, 'height': 8, 'width': 16}]"
    # Four frames at 25 per second show five at 30.
    options = [f"--config.data.buckets={buckets}", "--config.data.fps=30.0"]
    assert train(files, tmp_path, *options) == 0
    names = {name.split("@")[0] for batch, _ in drawn for name in batch["name"]}
    assert names == SHOWN.keys()
    assert {batch["video"].shape for batch, _ in drawn} == {(8, 1, 16, 24, 3), (8, 5, 8, 16, 3)}
    assert all(broken == {} for _, broken in drawn)


def test_training_replaces_what_is_not_finite(files, broken, tmp_path, drawn, caplog):
    for folder in (files, broken):
        for path in folder.iterdir():
            (tmp_path / "all").mkdir(exist_ok=True)
            (tmp_path / "all" / path.name).write_bytes(path.read_bytes())
    assert train(tmp_path / "all", tmp_path) == 0
    names = {name for batch, _ in drawn for name in batch["name"]}
    assert not {name for name in names if name.startswith("nan.tiff")} and "nan.nut@0.240s" not in names
    assert "nan.tiff: cannot be decoded as an image: pixels are not finite" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan.tiff", "nan.tiff: cannot be decoded as an image: pixels are not finite, the first in row 7"),
        ("nan.nut", "nan.nut: pixels are not finite at 0.250 s"),
    ],
)
def test_encode_names_the_pixels_that_are_not_finite(broken, workdir, tmp_path, capsys, name, message):
    out = tmp_path / "a.safetensors"
    assert main(["encode", str(broken / name), "--vae", str(workdir), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_frames_of_several_sizes_are_an_error_with_a_remedy(files, workdir, tmp_path, capsys, monkeypatch):
    sizes = iter([(12, 20), (12, 20), (12, 16)])
    monkeypatch.setattr(
        "vidgen.data.video_io.read_frames",
        lambda *_, **__: (np.zeros((*size, 3), np.uint8) for size in sizes),
    )
    out = tmp_path / "a.safetensors"
    assert main(["encode", str(files / "deep.mp4"), "--vae", str(workdir), "--out", str(out)]) == 2
    assert "frame 2 is 12 x 16, those before it 12 x 20: give --height and --width" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def encoded(files, workdir, tmp_path):
    out = tmp_path / "a.safetensors"
    assert main(["encode", str(files / "deep.mp4"), "--vae", str(workdir), "--out", str(out)]) == 0
    return out


def test_latents_that_are_not_finite_name_the_frames(files, workdir, encoded, tmp_path, capsys):
    tensors = load_file(encoded)
    tensors["latents"][2, 1, 1, 0] = np.nan
    save_file(tensors, encoded)
    assert main(["decode", str(encoded), "--out", str(tmp_path / "a.mp4")]) == 2
    assert "a.safetensors: latent frame 2 (frames 3 to 4) is not finite" in capsys.readouterr().err

    vae = load_vae(workdir)
    vae.quant_conv.bias[...] = jnp.full_like(vae.quant_conv.bias[...], jnp.inf)
    save_vae(vae, tmp_path)
    out = tmp_path / "b.safetensors"
    assert main(["encode", str(files / "deep.mp4"), "--vae", str(tmp_path), "--out", str(out)]) == 2
    assert f"encoded by {tmp_path}: latent frame 0 (frame 0) is not finite" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "a.mp4").exists()


def test_frames_that_are_not_finite_are_named(workdir, encoded, tmp_path, capsys):
    vae = load_vae(workdir)
    vae.decoder.conv_out.bias[...] = jnp.full_like(vae.decoder.conv_out.bias[...], jnp.nan)
    save_vae(vae, tmp_path)
    for name in ("a.mp4", "a.gif"):
        assert main(["decode", str(encoded), "--vae", str(tmp_path), "--out", str(tmp_path / name)]) == 2
        assert f"decoded by {tmp_path}: frame 0 is not finite" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.json", "vae"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"latents": (3, 3, 4, 3)},
            "holds latents [3, 3, 4, 3]; expected latents [3, 3, 5, 'channels'] alone",
        ),
        ({"latents": (3, 3, 5, 3), "more": (2,)}, "holds latents [3, 3, 5, 3], more [2]; expected latents"),
        ({"latent": (3, 3, 5, 3)}, "holds latent [3, 3, 5, 3]; expected latents"),
        ({}, "holds nothing; expected latents"),
    ],
)
def test_a_file_that_holds_other_tensors_than_latents(encoded, tmp_path, capsys, tensors, message):
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, encoded)
    assert main(["decode", str(encoded), "--out", str(tmp_path / "a.mp4")]) == 2
    assert f"{encoded} {message}" in capsys.readouterr().err


def test_a_description_that_cannot_be_read(encoded, tmp_path, capsys):
    described = encoded.with_suffix(".json")
    values = json.loads(described.read_text())
    described.write_text(json.dumps(values)[:-5])
    assert main(["decode", str(encoded), "--out", str(tmp_path / "a.mp4")]) == 2
    assert "a.json: not JSON" in capsys.readouterr().err
    described.write_text(json.dumps({**values, "hight": 3}))
    assert main(["decode", str(encoded), "--out", str(tmp_path / "a.mp4")]) == 2
    assert 'unknown key "hight" for LatentsInfo; did you mean "height"' in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_weights_that_do_not_fit_name_every_tensor(files, workdir, encoded, tmp_path, capsys, command):
    save_vae(load_vae(workdir), tmp_path)
    path = tmp_path / "vae" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.conv_in.bias"]
    tensors["decoder.conv_out.bias"] = np.zeros(7, np.float32)
    tensors["more"] = np.zeros((2, 3), np.float32)
    save_file(tensors, path)
    source = files / "deep.mp4" if command == "encode" else encoded
    out = tmp_path / ("b.safetensors" if command == "encode" else "b.mp4")
    assert main([command, str(source), "--vae", str(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors does not fit the model (3 tensors)" in error
    assert "encoder.conv_in.bias: missing in the file, expected (4,)" in error
    assert "decoder.conv_out.bias: (7,) in the file, expected (12,)" in error
    assert "more: only in the file, (2, 3)" in error
    assert not out.exists()
