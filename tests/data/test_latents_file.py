import contextlib
import json
import os
import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

from vidgen.core.errors import UserError
from vidgen.data.latents_file import LatentsInfo, load_latents, save_latents

INFO = LatentsInfo(
    num_frames=3, height=8, width=8, fps=8.0, vae="vae", spatial_factor=4, temporal_factor=2, source="a.mp4"
)
LATENTS = np.zeros((2, 2, 2, 3), np.float32)


@pytest.fixture
def path(tmp_path):
    save_latents(tmp_path / "a.safetensors", LATENTS, INFO)
    return tmp_path / "a.safetensors"


def test_others_may_read_what_is_written(path):
    umask = os.umask(0)
    os.umask(umask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"a.safetensors": 0o666 & ~umask, "a.json": 0o666 & ~umask}


@pytest.mark.parametrize("fps", [0, -1, 1e-9, 1e9, "8", None])
def test_a_rate_that_no_video_has(path, fps):
    about = path.with_suffix(".json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "fps": fps}))
    with pytest.raises(UserError, match=r"a\.json.*fps"):
        load_latents(path)


def test_latents_that_are_no_floats(path):
    save_file({"latents": LATENTS.astype(np.int32)}, path)
    with pytest.raises(UserError, match="type int32, expected floats"):
        load_latents(path)


def test_damaged_files_are_named(path):
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(data[: generator.integers(len(data))] if generator.random() < 0.3 else data)
        with contextlib.suppress(UserError):  # or what a flipped bit of a number gives
            load_latents(path)


def test_a_full_disk_is_one_line(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.safetensors cannot be written: File too large"):
            save_latents(path, LATENTS, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2
