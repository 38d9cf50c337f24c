import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vidgen.cli.data import main
from vidgen.data.tfds_clips import ArrayRecordData
from vidgen.data.video_io import save_video


@pytest.fixture
def clips(tmp_path):
    """A folder with a video of two seconds, one that is too short, and a broken one."""
    folder = tmp_path / "clips"
    video = np.random.default_rng(0).integers(0, 256, (16, 16, 24, 3), np.uint8)
    save_video(folder / "long.mp4", video, fps=8)
    save_video(folder / "short.mp4", video[:4], fps=8)
    (folder / "long.txt").write_text("noise")
    (folder / "broken.mp4").write_text("not a video")
    return folder


def test_check_lists_every_file_with_its_reason(clips, capsys):
    assert main(["check", str(clips), "--num-frames", "8", "--fps", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        'used      long.mp4: 2 clips; 24x16, 8 fps, 16 frames, 2.00 s (h264); "noise"',
        "NOT USED  broken.mp4: cannot be opened as video: Invalid data found when processing input",
        "NOT USED  short.mp4: too short: 0.50 s, a clip of 8 frames at 8 fps takes 1.00 s",
        "2 clips of 8 frames at 8 fps, from 1 files; 2 files not used",
    ]


def test_check_exits_with_1_if_nothing_is_left(clips, capsys):
    assert main(["check", str(clips), "--num-frames", "80"]) == 1
    out = capsys.readouterr()
    assert "too short" in out.out and "nothing in" in out.err


def test_check_of_an_empty_folder(tmp_path):
    assert main(["check", str(tmp_path)]) == 1


def test_check_with_captions(clips, capsys):
    arguments = ["check", str(clips), "--num-frames", "2", "--fps", "8"]
    assert main(arguments) == 0
    assert "1 of the files used have no caption" in capsys.readouterr().out
    assert main([*arguments, "--require-captions"]) == 0
    assert "NOT USED  short.mp4: no caption" in capsys.readouterr().out
    listed = clips.parent / "mine.csv"
    listed.write_text(f"file,caption\n{clips}/short.mp4,brief noise\n")
    assert main([*arguments, "--captions", str(listed)]) == 0
    assert '"brief noise"' in capsys.readouterr().out


def test_check_of_buckets_says_what_goes_where(clips, capsys):
    sizes = ["--bucket=1x16x32", "--bucket=5x16x32", "--fps=5"]
    assert main(["check", str(clips), *sizes]) == 0
    out = capsys.readouterr().out
    assert "clips of 1 x 16 x 32, " in out and " of 5 x 16 x 32; " in out
    assert "of 1 x 16 x 32 at 5 fps, from" in out
    assert main(["check", str(clips), *sizes, "--bucket=500x16x32"]) == 1
    assert "can be used for the bucket 500 x 16 x 32" in capsys.readouterr().err
    for wrong, message in (("1x16", "no size of clips"), ("1x0x16", "bucket 1 x 0 x 16.height: found 0")):
        assert main(["check", str(clips), f"--bucket={wrong}"]) == 2
        assert message in capsys.readouterr().err


def test_check_decode_finds_damage_inside(tmp_path, capsys):
    video = np.random.default_rng(0).integers(0, 256, (40, 16, 24, 3), np.uint8)
    path = tmp_path / "a.mp4"
    save_video(path, video, fps=8)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[start : start + 500] = bytes(500)
    path.write_bytes(data)
    assert main(["check", str(tmp_path), "--num-frames", "8", "--decode"]) == 1
    assert "NOT USED  a.mp4: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{}/gone"], "gone: no such folder"),
        (["check", "{}", "--captions", "{}/gone.csv"], "gone.csv: no such list"),
        (["check", "{}", "--fps", "0"], "--fps: found '0'"),
        (["check", "{}", "--frames", "0"], "unrecognized arguments"),
        (["check"], "DIR"),
        ([], "command"),
        (["build", "folder", "{}"], "--out"),
        (["build", "folder", "{}/gone", "--out", "{}/out"], "gone: no such folder"),
        (["build", "clouds", "--out", "{}/out"], "clouds"),
    ],
)
def test_wrong_use_exits_with_2(tmp_path, capsys, arguments, message):
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["check"], ["build"], ["build", "folder"], ["build", "sprites"]])
def test_help(arguments, capsys):
    assert main([*arguments, "--help"]) == 0
    assert "usage: vidgen data" in capsys.readouterr().out


def test_build_folder(clips, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["build", "folder", str(clips), "--out", str(out), "--num-frames", "8", "--height", "16"]
    assert main([*arguments, "--width", "16", "--stride", "0.5"]) == 0
    assert "wrote 3 clips in train" in capsys.readouterr().out.splitlines()[-1]
    source = ArrayRecordData(path=str(out), num_frames=8, height=16, width=16).source()
    assert len(source) == 3 and source[0]["video"].shape == (8, 16, 16, 3) and source[0]["caption"] == "noise"
    assert main(arguments) == 2
    assert "records here already" in capsys.readouterr().err


def test_build_folder_with_a_held_out_part(clips, tmp_path, capsys):
    arguments = ["build", "folder", str(clips), "--out", str(tmp_path / "out"), "--num-frames", "8"]
    assert main([*arguments, "--heldout-every", "2"]) == 0
    assert "wrote 1 clips in train, 1 clips in heldout" in capsys.readouterr().out


def test_build_sprites(tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--num-frames", "2", "--height", "16", "--width", "16"]
    assert (
        main(["build", "sprites", "--out", str(out), "--num-clips", "3", "--num-heldout", "2", *sizes]) == 0
    )
    assert "wrote 3 clips in train, 2 clips in heldout" in capsys.readouterr().out
    clip = ArrayRecordData(path=str(out), split="heldout", num_frames=2, height=16, width=16).source()[1]
    assert clip["video"].shape == (2, 16, 16, 3) and clip["boxes"].ndim == 3 and clip["caption"]


def test_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vidgen.cli.data", "check", str(tmp_path / "gone")],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr


def test_real_clips(capsys):
    folder = pathlib.Path(__file__).parents[2] / ".." / "shared" / "clips"
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder.resolve()} is absent")
    assert main(["check", str(folder), "--decode"]) == 0
    out = capsys.readouterr().out
    assert out.count("used      ") == 3 and "7 clips of 17 frames at 8 fps, from 3 files" in out


def test_images_are_described(tmp_path, capsys):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert main(["check", str(tmp_path), "--num-frames", "1"]) == 0
    assert "used      a.png: 1 clips; 30x20 image (png); no caption" in capsys.readouterr().out
