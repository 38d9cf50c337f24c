import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from vidgen.core.errors import UserError
from vidgen.data import latents_records
from vidgen.data.latents_records import LatentClip, LatentRecords, RecordsInfo, write_latent_records
from vidgen.data.source import BrokenClip

INFO = RecordsInfo(vae="runs/vae", encoder="0a", channels=3, spatial_factor=8, temporal_factor=4, fps=8.0)


def clip(index, *, frames=5, height=16, width=24, scale=1.0):
    shape = (*INFO.latent_size(frames, height, width), 3)
    latents = scale * np.random.default_rng(index).normal(size=shape).astype(np.float32)
    return LatentClip(
        latents=latents,
        caption=f'number {index}: "ä"',
        name=f"clip-{index}",
        num_frames=frames,
        height=height,
        width=width,
    )


CLIPS = [clip(index, frames=1 + 4 * (index % 3), height=8 + 8 * (index % 2)) for index in range(7)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven clips in several files."""
    monkeypatch.setattr(latents_records, "_SHARD_BYTES", 1500)
    assert write_latent_records(tmp_path / "latents", iter(CLIPS), INFO) == 7
    return tmp_path / "latents"


def test_clips_come_back_as_they_were_in_half_precision(folder):
    records = LatentRecords(folder)
    assert len(records) == 7 and len(records.info.shards) > 1
    assert records.sizes == [(c.num_frames, c.height, c.width) for c in CLIPS]
    assert records.info.latent_size(9, 16, 24) == (3, 2, 3)
    for index, expected in enumerate(CLIPS):
        found = records[index]
        assert (found["caption"], found["name"]) == (expected.caption, expected.name)
        assert found["latents"].dtype == np.float16
        np.testing.assert_array_equal(found["latents"], expected.latents.astype(np.float16))
    with pytest.raises(IndexError, match="clip 7 of 7"):
        records[7]


def test_a_size_of_less_than_a_latent_is_damage(folder):
    sizes = np.load(folder / "sizes.npy")
    sizes[3, 2] = INFO.spatial_factor - 1
    np.save(folder / "sizes.npy", sizes)
    with pytest.raises(UserError, match=r"sizes\.npy: clip 3 is of 1 x 16 x 7, which is less"):
        LatentRecords(folder)


def test_a_damaged_record_is_named_and_the_others_are_read(folder):
    shard = sorted(folder.glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    place = data.find(CLIPS[1].latents.astype(np.float16).tobytes()[:16])
    assert place > 0
    data[place] ^= 1
    shard.write_bytes(data)
    records = LatentRecords(folder)
    with pytest.raises(BrokenClip, match=rf"{shard.name}, record 1: its record is damaged") as broken:
        records[1]
    assert broken.value.name == f"{shard}, record 1"
    assert [records[index]["name"] for index in (0, 2, 6)] == ["clip-0", "clip-2", "clip-6"]


def test_records_of_other_sizes_than_the_index_says_are_damaged(folder):
    sizes = np.load(folder / "sizes.npy")
    sizes[-1, 0] += 4
    np.save(folder / "sizes.npy", sizes)
    records = LatentRecords(folder)
    with pytest.raises(
        BrokenClip, match=r"array_record, record \d: its latents are \[1, 1, 3, 3\], expected \[2"
    ):
        records[6]


def test_folders_that_are_not_whole_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"latents\.json is missing: give a folder that `vidgen data"):
        LatentRecords(tmp_path)
    shards = sorted(folder.glob("*.array_record"))
    whole = shards[-1].read_bytes()
    shards[-1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"latents is damaged \(.*: write the latents again"):
        LatentRecords(folder)
    shards[-1].write_bytes(shards[0].read_bytes())
    with pytest.raises(
        ValueError, match=r"is damaged: .* speaks of 7 clips, .* of 7, and the files have \d+:"
    ):
        LatentRecords(folder)
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[-1].name} is missing: write the latents again"):
        LatentRecords(folder)
    (folder / "latents.json").write_text("{")
    with pytest.raises(ValueError, match=r"latents\.json: not JSON"):
        LatentRecords(folder)


def test_a_folder_that_is_there_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="is there already; remove it"):
        write_latent_records(folder, iter(CLIPS), INFO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "no clips to write"),
        ([CLIPS[0], clip(8, scale=1e6)], "clip-8: latents of up to .* are not finite as float16"),
        ([clip(9, scale=np.nan)], "clip-9: latents of up to nan are not finite"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, clips, message):
    with pytest.raises(ValueError, match=message):
        write_latent_records(tmp_path / "new", iter(clips), INFO)
    assert not list(tmp_path.iterdir())


def test_a_killed_call_leaves_no_folder_that_looks_whole_and_the_next_one_cleans_up(tmp_path):
    script = textwrap.dedent("""
        import os, signal
        from tests.data.test_latents_records import CLIPS, INFO, write_latent_records

        def clips():
            yield from CLIPS
            os.kill(os.getpid(), signal.SIGKILL)

        write_latent_records("latents", clips(), INFO)
    """)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = os.environ | {"PYTHONPATH": root}
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["latents.incomplete"]
    with pytest.raises(FileNotFoundError):
        LatentRecords(tmp_path / "latents")
    assert write_latent_records(tmp_path / "latents", iter(CLIPS), INFO) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
