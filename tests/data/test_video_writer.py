import io
import os

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from vidgen.core.errors import UserError
from vidgen.data import video_writer
from vidgen.data.video_reader import probe, read_clip
from vidgen.data.video_writer import read_metadata, save_frames, save_video, write_mp4

TEXTS = {"prompt": 'a "réd" circle\nmoves left', "seed": "0"}


def colours(count=5, height=32, width=48):
    """Flat patches of strong colours, and a moving bar."""
    video = np.zeros((count, height, width, 3), np.uint8)
    video[:, :, : width // 3] = (220, 20, 30)
    video[:, :, width // 3 : 2 * width // 3] = (20, 200, 40)
    video[:, :, 2 * width // 3 :] = (30, 40, 210)
    for index in range(count):
        video[index, 4 * index : 4 * index + 4] = 255
    return video


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "A.MP4"])
def test_metadata_comes_back(tmp_path, name):
    save_video(tmp_path / name, colours(), fps=8, metadata=TEXTS)
    assert read_metadata(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_no_metadata(tmp_path, name):
    save_video(tmp_path / name, colours(), fps=8)
    assert not set(read_metadata(tmp_path / name)) & set(TEXTS)


def test_mp4_looks_the_same_and_keeps_its_rate(tmp_path):
    video = colours()
    save_video(tmp_path / "a.mp4", video, fps=29.97)
    seen = read_clip(tmp_path / "a.mp4")
    inside = np.s_[:, 24:, [8, 24, 40]]
    assert seen.shape == video.shape and abs(seen[inside].astype(int) - video[inside]).max() <= 6
    info = probe(tmp_path / "a.mp4")
    assert info.fps == pytest.approx(30000 / 1001) and info.num_frames == 5 and info.codec == "h264"
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        assert context.pix_fmt == "yuv420p"


def test_mp4_begins_with_its_index(tmp_path):
    save_video(tmp_path / "a.mp4", colours(), fps=8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_odd_sides_are_padded_with_their_edge(tmp_path):
    video = colours(height=33, width=47)
    save_video(tmp_path / "a.mp4", video, fps=8, crf=4)
    seen = read_clip(tmp_path / "a.mp4")
    assert seen.shape == (5, 34, 48, 3)
    assert abs(seen[0, 30, 47].astype(int) - video[0, 30, 46]).max() <= 8


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_lossless(size):
    video = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    buffer = io.BytesIO()
    write_mp4(buffer, video, fps=8, crf=0, pix_fmt="rgb24")
    buffer.seek(0)
    np.testing.assert_array_equal(read_clip(buffer), video)


def test_gif_keeps_colours_and_time(tmp_path):
    video = colours(9)
    save_video(tmp_path / "a.gif", video, fps=8)
    seen = read_clip(tmp_path / "a.gif", num_frames=9, fps=8)
    assert abs(seen.astype(int) - video).max() <= 8
    with Image.open(tmp_path / "a.gif") as image:
        lasts = []
        for index in range(image.n_frames):
            image.seek(index)
            lasts.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert sum(lasts) == pytest.approx(9 / 8 * 1000, abs=10) and len(set(lasts)) > 1


def test_png_of_one_frame_is_exact(tmp_path):
    video = colours(1)
    save_video(tmp_path / "a.png", video, fps=8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), video[0])


def test_png_of_several_frames_is_a_grid(tmp_path):
    video = colours(5, height=20, width=12)
    save_video(tmp_path / "a.png", video, fps=8)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * 20, 3 * 12, 3)
    for index, frame in enumerate(video):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(grid[20 * row : 20 * row + 20, 12 * column : 12 * column + 12], frame)
    assert not grid[20:, 24:].any()


def test_folder_is_made_and_nothing_else_left(tmp_path):
    save_video(tmp_path / "new" / "b" / "a.mp4", colours(), fps=8)
    assert [path.name for path in (tmp_path / "new" / "b").iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(video_writer.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_video(tmp_path / name, colours(), fps=8)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


def test_failure_while_encoding_leaves_nothing(tmp_path, monkeypatch):
    frames = 0

    class Failing:
        def reformat(self, frame, **keywords):
            nonlocal frames
            frames += 1
            if frames > 3:
                raise MemoryError("no memory left")
            return VideoReformatter().reformat(frame, **keywords)

    monkeypatch.setattr(video_writer, "VideoReformatter", Failing)
    with pytest.raises(MemoryError):
        save_video(tmp_path / "a.mp4", colours(), fps=8)
    assert frames == 4 and list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_a_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_video(tmp_path / "a.png", colours(1), fps=8)
    assert os.stat(tmp_path / "a.png").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize(
    ("name", "video", "fps", "message"),
    [
        ("a.avi", colours(), 8, r"a\.avi: cannot write \"\.avi\".*\.mp4, \.gif, \.png"),
        ("a", colours(), 8, r"\.mp4, \.gif, \.png"),
        ("a.mp4", colours()[:0], 8, "empty"),
        ("a.mp4", colours().astype(np.float32), 8, r"uint8.*got float32 \[5, 32, 48, 3\]"),
        ("a.mp4", colours()[0], 8, r"got uint8 \[32, 48, 3\]"),
        ("a.mp4", colours()[..., :1], 8, r"got uint8 \[5, 32, 48, 1\]"),
        ("a.mp4", colours(), 0, "fps is 0"),
        ("a.mp4", colours(), float("nan"), "fps is nan"),
    ],
)
def test_mistakes_are_named(tmp_path, name, video, fps, message):
    with pytest.raises(ValueError, match=message):
        save_video(tmp_path / name, video, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_others(tmp_path, numbered_video):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", comment=b"hello")
    assert read_metadata(tmp_path / "a.gif") == {"comment": "hello"}
    assert "encoder" in read_metadata(numbered_video("a.mp4", 2))
    with pytest.raises(FileNotFoundError, match=r"b\.mp4"):
        read_metadata(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"c\.mp4: cannot read"):
        read_metadata(tmp_path / "c.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 8, "has no frames"),
        ([np.zeros((16, 16, 3), np.float32)], 8, r"a clip is uint8 .* got float32 \[1, 16, 16, 3\]"),
        ([np.zeros((16, 16), np.uint8)], 8, r"got uint8 \[1, 16, 16\]"),
        ([np.zeros((n, 16, 3), np.uint8) for n in (16, 32)], 8, r"frame 1 has the shape \(32, 16, 3\)"),
        ([np.zeros((16, 16, 3), np.uint8)], float("nan"), "fps is nan"),
    ],
)
def test_a_stream_of_frames_that_is_no_clip(tmp_path, suffix, frames, fps, message):
    with pytest.raises(UserError, match=message):
        save_frames(tmp_path / f"a{suffix}", iter(frames), fps=fps)
    assert not any(tmp_path.iterdir())
