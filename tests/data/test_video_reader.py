import io
import itertools

import numpy as np
import pytest

from vidgen.data.source import BrokenClip
from vidgen.data.video_reader import probe, read_clip

SLOW_KEYS = {"g": "12", "bf": "3", "crf": "10"}
"""Key frames 12 apart with reordered frames between them: what makes seeking hard."""


@pytest.fixture
def video(numbered_video):
    """60 numbered frames at 25 fps."""
    return numbered_video("a.mp4", 60, options=SLOW_KEYS)


def test_every_start_is_frame_accurate(video, number_of):
    for frame in range(60):
        assert number_of(read_clip(video, start=frame / 25, num_frames=1, fps=25)[0]) == frame


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.avi", "a.mov", "a.webm"])
def test_containers_seek_as_accurately(name, numbered_video, number_of):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    options = {"g": "12", "cpu-used": "8", "deadline": "realtime"} if name.endswith("webm") else SLOW_KEYS
    path = numbered_video(name, 40, codec=codec, options=options)
    found = {
        frame: number_of(read_clip(path, start=frame / 25, num_frames=1, fps=25)[0])
        for frame in (0, 11, 12, 30, 39)
    }
    assert found == {frame: frame for frame in found}
    assert probe(path).duration == pytest.approx(1.6, abs=0.05)


def test_a_start_between_two_frames_takes_the_nearer(video, number_of):
    def first(start):
        return number_of(read_clip(video, start=start, num_frames=1, fps=25)[0])

    assert first(20.4 / 25) == 20
    assert first(20.6 / 25) == 21
    assert first(20.5 / 25) == 20  # equally near: the earlier


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("fps", [8, 12.5, 25, 30, 60])
def test_resampling_takes_the_nearest_frame_at_each_time(video, number_of, fps, start):
    clip = read_clip(video, start=start, num_frames=9, fps=fps)
    shown = np.arange(60) / 25
    targets = start + np.arange(9) / fps
    expected = [int(np.argmin(np.round(np.abs(shown - target), 6))) for target in targets]
    assert [number_of(frame) for frame in clip] == expected


def test_variable_frame_rate_follows_presentation_times(numbered_video, number_of):
    times = [0.0, 0.1, 0.2, 0.9, 1.0, 1.1, 1.8, 1.9]
    path = numbered_video("a.mkv", 8, times=times, options={"bf": "0"})
    clip = read_clip(path, num_frames=10, fps=5)
    expected = [int(np.argmin(np.abs(np.array(times) - index / 5))) for index in range(10)]
    assert [number_of(frame) for frame in clip] == expected == [0, 2, 2, 3, 3, 4, 5, 5, 6, 6]


def test_without_fps_every_frame_comes_once(video, number_of):
    assert [number_of(frame) for frame in read_clip(video)] == list(range(60))
    assert [number_of(frame) for frame in read_clip(video, start=0.4, num_frames=5)] == [10, 11, 12, 13, 14]


def test_a_clip_may_end_with_the_last_frame_and_not_later(video, number_of):
    clip = read_clip(video, start=1.4, num_frames=8, fps=8)  # the last is wanted at 2.275 s
    assert number_of(clip[-1]) == 57
    with pytest.raises(BrokenClip, match=r"a\.mp4: only 8 of 9 frames at 8 fps follow 1\.400 s"):
        read_clip(video, start=1.4, num_frames=9, fps=8)


def test_whole_file_at_another_rate_lasts_as_long(video):
    assert len(read_clip(video, fps=8)) == 20  # 2.4 s: targets at 0, 0.125, ... 2.375


def test_size_is_covered_and_the_middle_kept(tmp_path, write):
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, :32], frame[:, 32:96], frame[:, 96:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = write(tmp_path / "a.mkv", [frame], codec="ffv1", pix_fmt="bgra", source_format="rgb24")
    middle = read_clip(path, height=32, width=32)
    assert middle.shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(middle[0, :, 2:-2], np.broadcast_to(np.uint8([0, 255, 0]), (32, 28, 3)))
    left, right = (read_clip(path, height=32, width=32, crop_at=(0.5, x))[0] for x in (0.0, 1.0))
    assert left[16, 4].tolist() == [255, 0, 0] and right[16, -4].tolist() == [0, 0, 255]


def test_aspect_ratio_is_kept(tmp_path, write):
    y, x = np.indices((90, 160))
    disc = (np.hypot(y - 45, x - 80) < 30).astype(np.uint8) * 255
    path = write(tmp_path / "a.mp4", [np.repeat(disc[..., None], 3, -1)] * 2)
    seen = read_clip(path, height=60, width=40)[0, :, :, 0] > 127
    assert seen.any(1).sum() == pytest.approx(40, abs=1)
    assert read_clip(path, height=60, width=60)[0, :, :, 0].mean() == pytest.approx(
        255 * np.pi * 20**2 / 60**2, rel=0.02
    )


def test_shrinking_does_not_alias(tmp_path, write):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    path = write(tmp_path / "a.mkv", [np.repeat(board[..., None], 3, -1)], codec="ffv1", pix_fmt="bgra")
    small = read_clip(path, height=16, width=16).astype(int)
    assert abs(small - 127).max() <= 8


def test_pixel_aspect_is_undone(shared_clips):
    info = probe(shared_clips / "carphone_pristine.mp4")
    assert (info.width, info.height) == (176, 144) and info.pixel_aspect == pytest.approx(128 / 117)


@pytest.mark.parametrize(
    ("degrees", "corner"), [(0, "top left"), (90, "bottom left"), (180, "bottom right"), (270, "top right")]
)
def test_rotation_is_honoured(tmp_path, write, degrees, corner):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:12, :12] = 255  # top left, before it is turned counter-clockwise
    path = write(tmp_path / "a.mp4", [frame] * 2, rotation=degrees)
    clip, info = read_clip(path), probe(path)
    height, width = (48, 32) if degrees % 180 else (32, 48)
    assert clip.shape == (2, height, width, 3)
    assert (info.height, info.width, info.rotation) == (height, width, -degrees % 360)
    lit = {
        f"{v} {h}": int(clip[0, y, x, 0]) > 127
        for (v, y), (h, x) in itertools.product((("top", 4), ("bottom", -5)), (("left", 4), ("right", -5)))
    }
    assert lit == {name: name == corner for name in lit}
    small = read_clip(path, height=16, width=16)[0, :, :, 0] > 127
    assert small[0 if "top" in corner else -1, 0 if "left" in corner else -1] and small.mean() < 0.1


def test_mirrored_display_matrix_is_honoured(tmp_path, write):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:12, :12] = 255
    clip = read_clip(write(tmp_path / "a.mp4", [frame] * 2, rotation=0, hflip=True))
    assert clip.shape == (2, 32, 48, 3) and clip[0, 4, -5, 0] > 127 and clip[0, :, :24].max() < 127


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.mp4", "libx264", "yuv420p10le", {"crf": "4"}),
        ("a.mov", "mjpeg", "yuvj420p", {"qmin": "1", "qmax": "1"}),
        ("a.mp4", "libx264", "yuv444p", {"crf": "4"}),
        ("a.mov", "prores_ks", "yuv422p10le", {}),
    ],
)
def test_depths_and_ranges_give_the_same_colours(tmp_path, write, name, codec, pix_fmt, options):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :16], frame[:, 16:32], frame[:, 32:48] = (255, 255, 255), (200, 30, 40), (128, 128, 128)
    path = write(tmp_path / name, [frame] * 2, codec=codec, pix_fmt=pix_fmt, options=options)
    assert probe(path).pix_fmt == pix_fmt
    seen = read_clip(path)[0].astype(int)
    for x in (8, 24, 40, 56):
        assert abs(seen[16, x] - frame[16, x]).max() <= 4, (x, seen[16, x])


def test_odd_sizes(numbered_video, number_of):
    path = numbered_video("a.mkv", 3, height=33, width=67, codec="ffv1", pix_fmt="yuv444p")
    clip = read_clip(path)
    assert clip.shape == (3, 33, 67, 3)
    assert read_clip(path, height=15, width=31).shape == (3, 15, 31, 3)


def test_transparent_video_is_laid_on_white(tmp_path, write):
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[:, 16:] = (10, 20, 30, 255)
    path = write(tmp_path / "a.mov", [frame], codec="png", pix_fmt="rgba", source_format="rgba")
    clip = read_clip(path)
    assert clip[0, 8, 8].tolist() == [255, 255, 255] and clip[0, 8, 24].tolist() == [10, 20, 30]


def test_an_untagged_high_video_is_read_as_bt709(tmp_path, write):
    colour = np.uint8([200, 30, 40])
    low = write(tmp_path / "low.mp4", [np.broadcast_to(colour, (64, 64, 3)).copy()], options={"crf": "4"})
    high = write(tmp_path / "high.mp4", [np.broadcast_to(colour, (720, 64, 3)).copy()], options={"crf": "4"})
    assert abs(read_clip(low)[0, 8, 8].astype(int) - colour).max() <= 4
    assert abs(read_clip(high)[0, 8, 8].astype(int) - colour).max() > 8  # it was written as BT.601


def test_probe(video):
    info = probe(video)
    assert (info.width, info.height, info.fps, info.num_frames) == (64, 32, 25, 60)
    assert info.duration == pytest.approx(2.4) and info.codec == "h264" and info.pix_fmt == "yuv420p"
    assert not info.has_audio and not info.is_image and info.pixel_aspect == 1


def test_video_in_memory(video, number_of):
    clip = read_clip(io.BytesIO(video.read_bytes()), start=1.0, num_frames=2, fps=25)
    assert [number_of(frame) for frame in clip] == [25, 26]


def test_a_cut_off_file_is_broken_where_it_is_cut(video, tmp_path, number_of):
    head = tmp_path / "head.ts"
    head.write_bytes(b"")
    with pytest.raises(BrokenClip, match="cannot be opened"):
        probe(head)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(BrokenClip, match=r"cut\.mp4: cannot be opened as video: Invalid data"):
        read_clip(cut)


def test_damage_inside_is_an_error(video, tmp_path):
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with pytest.raises(BrokenClip, match=r"damaged|cannot be decoded"):
        read_clip(damaged)


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50])
def test_other_files_are_broken_clips(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(BrokenClip, match=r"a\.mp4") as caught:
        probe(path)
    assert caught.value.name == str(path) and "cannot be opened" in caught.value.reason
    with pytest.raises(BrokenClip, match="cannot be opened"):
        read_clip(tmp_path / "absent.mp4")


def test_sound_alone_is_no_video(tmp_path):
    import av

    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BrokenClip, match="no video stream"):
        probe(path)


def test_text_is_no_video(tmp_path):
    path = tmp_path / "a.nfo"
    path.write_text("x" * 2000)
    with pytest.raises(BrokenClip):
        probe(path)


@pytest.mark.parametrize("keywords", [{"height": 8}, {"start": -1.0}, {"fps": 0.0}, {"num_frames": 0}])
def test_arguments_that_do_not_fit(video, keywords):
    with pytest.raises(ValueError, match=r"height|start|num_frames"):
        read_clip(video, **keywords)
