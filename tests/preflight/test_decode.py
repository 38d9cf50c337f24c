"""The decoder compiled for eight CPU devices, and the command around it."""

import dataclasses
import json

import jax
import pytest

from tests.preflight.test_preflight import VAE
from vidgen.cli import main as cli
from vidgen.cli import preflight as command
from vidgen.models.video_vae.config import VARIANTS
from vidgen.preflight import decode as decoding
from vidgen.preflight.decode import compile_decode
from vidgen.preflight.topology import Chip

CONFIG = dataclasses.replace(VARIANTS["tiny"], dim_mult=(1, 2), temporal_downsample=(True,))


@pytest.fixture(scope="module")
def report():
    return compile_decode(CONFIG, jax.devices(), (9, 16, 32), "eight CPUs")


def test_frames_are_cut_over_all_devices_and_longer_videos_take_more_only_to_hold_them(report):
    assert report.mesh == {"data": 1, "fsdp": 1, "context": 4, "tensor": 2}
    assert report.latents == (1, 5, 4, 8, CONFIG.latent_channels)
    assert report.collectives["collective-permute"] > 0
    assert report.memory.outputs == 9 * 16 * 32 * 3 / 8
    longer = compile_decode(CONFIG, jax.devices(), (41, 16, 32), "eight CPUs")
    assert longer.flops > 4 * report.flops
    # What is beside the arguments and two copies of the frames stays.
    frames = longer.memory.outputs - report.memory.outputs
    assert longer.memory.temporaries - report.memory.temporaries <= 2 * frames


def test_command(report, monkeypatch, capsys):
    monkeypatch.setattr(command, "prepare_environment", lambda: None)
    monkeypatch.setattr(command, "topology_devices", lambda name: jax.devices())
    asked = []
    monkeypatch.setattr(decoding, "compile_decode", lambda *args: asked.append(args) or report)
    options = ["preflight", f"--config={VAE}", "--topology=v5e:2x4"]
    assert cli.main([*options, "--decode=9x16x32"]) == 0
    [(config, devices, video, topology)] = asked
    assert (config.dtype, len(devices), video, topology) == ("bfloat16", 8, (9, 16, 32), "v5e:2x4")
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["fits"] and any("9 frames of 16 x 32" in line for line in table)
    with pytest.raises(SystemExit):
        cli.main([*options, "--decode=1080p"])
    assert "'1080p': expected frames, height and width, as 1441x1080x1920" in capsys.readouterr().err


def test_too_large_is_status_1(report, monkeypatch):
    chip = Chip(kind="cpu", hbm_bytes=1000, bf16_flops=1e12)
    monkeypatch.setattr(decoding, "chip_of", lambda device: chip)
    found = compile_decode(CONFIG, jax.devices()[:1], (1, 16, 32), "one CPU")
    assert not found.ok and "DOES NOT FIT" in found.table() and found.least_seconds > 0


def test_a_size_that_the_vae_does_not_take_is_an_error():
    with pytest.raises(ValueError, match=r"num_frames=8 is not 1 \+ 2 n; use 7 or 9"):
        compile_decode(CONFIG, jax.devices(), (8, 16, 32), "eight CPUs")
