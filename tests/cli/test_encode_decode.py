import json

import av
import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG
from vidgen.cli.main import main
from vidgen.core import pixels
from vidgen.data.latents_file import load_latents
from vidgen.data.video_io import read_clip, read_metadata, save_video
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.vae_folder import load_vae, save_vae


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_vae(random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0))), folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four frames of 10 x 14: no 1 + 2 n, and no multiples of 4."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    save_video(path, np.random.default_rng(0).integers(0, 255, (4, 10, 14, 3), np.uint8), fps=12)
    return path


@pytest.fixture(scope="module")
def encoded(workdir, clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new" / "clip.safetensors"
    assert main(["encode", str(clip), "--vae", str(workdir), "--out", str(out)]) == 0
    return out


def test_latents_are_those_of_the_filled_clip(workdir, clip, encoded):
    latents, info = load_latents(encoded)
    assert (info.num_frames, info.height, info.width, info.fps) == (4, 10, 14, 12.0)
    assert (info.spatial_factor, info.temporal_factor, info.source) == (4, 2, str(clip))
    assert json.loads(encoded.with_suffix(".json").read_text())["vae"] == str(workdir)
    video = np.pad(read_clip(clip), ((0, 1), (0, 2), (0, 2), (0, 0)), mode="edge")
    encode = jax.jit(lambda vae, video: vae.encode(pixels.to_float(video)))
    expected = encode(load_vae(workdir), video[None])
    np.testing.assert_allclose(latents, expected[0], rtol=1e-4, atol=1e-4)
    assert latents.shape == (3, 3, 4, 3)


def test_decoded_has_the_frames_size_and_rate_of_the_clip(workdir, encoded, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    assert main(["decode", str(encoded), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with av.open(str(out)) as container:
        assert float(container.streams.video[0].average_rate) == 12.0
    assert read_clip(out).shape == (4, 10, 14, 3)
    assert json.loads(read_metadata(out)["vidgen"])["vae"] == str(workdir)
    still = tmp_path / "a.png"
    assert main(["decode", str(encoded), "--out", str(still), "--vae", str(workdir), "--group", "2"]) == 0
    assert still.exists()


def test_an_image_is_one_latent_frame(workdir, tmp_path):
    image = tmp_path / "a.png"
    save_video(image, np.full((1, 8, 8, 3), 200, np.uint8), fps=1)
    assert main(["encode", str(image), "--vae", str(workdir), "--out", str(tmp_path / "a.safetensors")]) == 0
    latents, info = load_latents(tmp_path / "a.safetensors")
    assert latents.shape == (1, 2, 2, 3) and info.num_frames == 1


def test_errors_name_what_is_wrong(workdir, encoded, tmp_path, capsys):
    out = ["--out", str(tmp_path / "b.mp4")]
    assert main(["decode", str(tmp_path / "none.safetensors"), *out]) == 2
    assert "none.safetensors is missing" in capsys.readouterr().err
    assert main(["decode", str(encoded), "--out", "b.webm"]) == 2
    assert "b.webm" in capsys.readouterr().err
    other = VAEConfig(base_dim=4, latent_channels=5, dim_mult=(1, 2), temporal_downsample=(True,))
    save_vae(random_module(lambda: VideoVAE(other, rngs=nnx.Rngs(0))), tmp_path)
    assert main(["decode", str(encoded), "--vae", str(tmp_path), *out]) == 2
    assert "(4, 2, 3)" in capsys.readouterr().err
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    assert main(["encode", str(broken), "--vae", str(workdir), *out]) == 2
    assert "b.mp4: latents are written to .safetensors" in capsys.readouterr().err
    assert main(["decode", str(encoded), "--group", "0", *out]) == 2
    assert "--group: found 0" in capsys.readouterr().err
    latents = ["--out", str(tmp_path / "b.safetensors")]
    assert main(["encode", str(broken), "--vae", str(workdir), *latents]) == 2
    assert "broken.mp4" in capsys.readouterr().err
    assert not list(tmp_path.glob("b.*"))


def test_tiles_are_for_one_small_device(workdir, encoded, tmp_path, capsys):
    whole, tiled = tmp_path / "whole.png", tmp_path / "tiled.png"
    arguments = ["decode", str(encoded), "--out"]
    assert main([*arguments, str(whole)]) == 0
    assert main([*arguments, str(tiled), "--tile", "8", "--overlap", "4"]) == 0
    frames = [read_clip(path).astype(np.float32) for path in (whole, tiled)]
    assert frames[0].shape == frames[1].shape
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 64  # Seen through other surroundings.
    assert main([*arguments, str(tiled), "--tile", "16"]) == 0
    np.testing.assert_array_equal(read_clip(tiled), read_clip(whole))  # One tile holds the frame.
    capsys.readouterr()
    for wrong, message in (
        (["--tile", "6"], "--tile 6: give a multiple of 4"),
        (["--overlap", "4"], "--overlap is of tiles: give --tile too"),
        (["--tile", "4", "--overlap", "4"], "overlap=1 of tiles of 1 x 1"),
    ):
        assert main([*arguments, str(tiled), *wrong]) == 2
        assert message in capsys.readouterr().err
