import json

import numpy as np
import pytest
from PIL import Image

from vidgen.core.config import resolve, to_dict
from vidgen.data.folder import FolderData
from vidgen.data.loader import Loader
from vidgen.data.source import BrokenClip, ClipSource


@pytest.fixture
def options(tmp_path):
    """Clips of 5 frames at 5 fps: one second each."""

    def make(**keywords):
        return FolderData(
            **{"path": str(tmp_path), "num_frames": 5, "fps": 5.0, "height": 16, "width": 32, **keywords}
        )

    return make


def starts(report):
    return {file.name: [round(start, 6) for start in file.starts] for file in report.used}


def test_clips_fill_each_video(numbered_video, options, number_of, tmp_path):
    (tmp_path / "sub").mkdir()
    numbered_video("b.mp4", 88)
    numbered_video("sub/a.mkv", 25)
    report = options().scan()
    assert starts(report) == {"b.mp4": [0.0, 1.0, 2.0], "sub/a.mkv": [0.0]}
    assert report.rejected == () and report.num_clips == 4
    source = options().source()
    assert isinstance(source, ClipSource) and len(source) == 4
    clip = source[1]
    assert clip["name"] == "b.mp4@1.000s" and clip["caption"] == ""
    assert clip["video"].shape == (5, 16, 32, 3) and clip["video"].dtype == np.uint8
    assert [number_of(frame) for frame in clip["video"]] == [25, 30, 35, 40, 45]
    assert len({source[index]["name"] for index in range(4)}) == 4
    for index in (4, -1):
        with pytest.raises(IndexError):
            source[index]


def test_stride(numbered_video, options):
    numbered_video("a.mp4", 50)
    assert starts(options(stride=0.4).scan()) == {"a.mp4": [0.0, 0.4, 0.8]}
    assert starts(options(stride=5.0).scan()) == {"a.mp4": [0.0]}


def test_every_promised_clip_can_be_read(options, write, numbered, tmp_path):
    for index, (count, fps) in enumerate([(26, 25), (31, 29.97), (24, 23.976), (7, 6), (61, 60)]):
        write(tmp_path / f"{index}.mp4", [numbered(n) for n in range(count)], fps=fps)
    source = options(stride=0.1).source()
    assert {source[index]["name"][0] for index in range(len(source))} == set("01234")


def test_what_is_not_used_has_a_reason(numbered_video, options, tmp_path):
    numbered_video("good.mp4", 30)
    numbered_video("short.mp4", 20)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "alone.txt").write_text("a caption")
    (tmp_path / ".hidden.mp4").write_text("ignored")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.mp4").write_text("ignored")
    (tmp_path / "captions.jsonl").write_text('{"file": "gone.mp4", "caption": "x"}\n')
    report = options().scan()
    assert starts(report) == {"good.mp4": [0.0]}
    assert dict(report.rejected) == {
        "alone.txt": "a caption with no video or image of the same name beside it",
        "empty.mp4": "the file is empty",
        "gone.mp4": f"named in {tmp_path}/captions.jsonl, but there is no such file",
        "image.png": "an image is one frame, 5 are wanted",
        "short.mp4": "too short: 0.80 s, a clip of 5 frames at 5 fps takes 1.00 s",
        "text.mp4": "cannot be opened as video: Invalid data found when processing input",
    }


def test_images_and_videos_as_single_frames(numbered_video, options, tmp_path):
    numbered_video("a.mp4", 30)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    data = options(num_frames=1, stride=1.0)
    assert starts(data.scan()) == {"a.mp4": [0.0, 1.0], "b.png": [0.0]}
    clip = data.source()[2]
    assert clip["name"] == "b.png" and clip["video"].shape == (1, 16, 32, 3)
    assert clip["video"][0, 8, 8].tolist() == [255, 0, 0]


def test_every_video_shows_at_least_one_frame(numbered_video, options):
    numbered_video("a.mp4", 1)
    data = options(num_frames=1)
    assert starts(data.scan()) == {"a.mp4": [0.0]}
    assert data.source()[0]["video"].shape == (1, 16, 32, 3)


def test_captions(numbered_video, options, tmp_path, caplog):
    for name in ("a", "b"):
        numbered_video(f"{name}.mp4", 25)
    (tmp_path / "a.txt").write_text("a moving bar")
    source = options().source()
    assert [source[index]["caption"] for index in range(2)] == ["a moving bar", ""]
    assert "1 files have no caption" in caplog.text
    report = options(require_captions=True).scan()
    assert list(starts(report)) == ["a.mp4"] and report.rejected == (("b.mp4", "no caption"),)
    (tmp_path / "b.txt").write_bytes("été".encode("latin-1"))
    assert dict(options().scan().rejected)["b.mp4"].startswith("its caption cannot be read")


def test_held_out_seconds(numbered_video, options):
    numbered_video("a.mp4", 250)  # ten seconds
    every = [index * 0.5 for index in range(19)]
    found = {
        split: starts(options(split=split, heldout_every=4, stride=0.5).scan())["a.mp4"]
        for split in ("train", "heldout", "all")
    }
    assert found["all"] == every
    # Seconds 3 and 7 are held out.
    assert found["heldout"] == [2.5, 3.0, 3.5, 6.5, 7.0, 7.5]
    assert sorted(found["train"] + found["heldout"]) == every


def test_short_files_are_held_out_whole(options, tmp_path):
    for index in range(200):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    parts = {
        split: set(starts(options(num_frames=1, split=split, heldout_every=4).scan()))
        for split in ("train", "heldout")
    }
    assert not parts["train"] & parts["heldout"] and len(parts["train"] | parts["heldout"]) == 200
    assert 30 <= len(parts["heldout"]) <= 70


def test_nothing_left_in_a_split_names_it(numbered_video, options):
    numbered_video("a.mp4", 100)
    with pytest.raises(ValueError, match=r'"heldout" \(heldout_every=3\).*none of its 3 clips belongs to'):
        options(split="heldout", heldout_every=3, num_frames=1, stride=1.5).source()


def test_nothing_to_use(options, tmp_path):
    with pytest.raises(ValueError, match="the folder is empty"):
        options().source()
    with pytest.raises(NotADirectoryError, match="no such folder"):
        options(path=str(tmp_path / "gone")).scan()


def test_random_crops_and_flips_depend_on_the_index_alone(options, write, tmp_path):
    pixels = np.zeros((16, 128, 3), np.uint8)
    pixels[..., 0] = np.arange(128) * 2
    write(tmp_path / "a.mkv", [pixels] * 60, codec="ffv1", pix_fmt="bgra")
    keywords = {"height": 16, "width": 16, "stride": 0.2, "crop": "random", "seed": 1}
    source, again = options(**keywords).source(), options(**keywords).source()
    clips = [source[index]["video"] for index in range(6)]
    lefts = [int(clip[0, 0, 0, 0]) for clip in clips]
    assert len(set(lefts)) > 3
    for index, clip in enumerate(clips):
        np.testing.assert_array_equal(again[index]["video"], clip)
        assert (clip == clip[:1]).all()  # the crop stays where it is during a clip
    assert [
        int(options(**{**keywords, "seed": 2}).source()[i]["video"][0, 0, 0, 0]) for i in range(6)
    ] != lefts
    flipped = options(**keywords, flip=True).source()
    mirrored = [not np.array_equal(flipped[index]["video"], clip) for index, clip in enumerate(clips)]
    assert 0 < sum(mirrored) < 6
    for index in np.flatnonzero(mirrored):
        np.testing.assert_array_equal(flipped[int(index)]["video"], clips[index][:, :, ::-1])


def test_damage_is_a_broken_clip_and_is_replaced_in_training(numbered_video, options, tmp_path):
    numbered_video("good.mp4", 30)
    data = bytearray(numbered_video("bad.mp4", 80, options={"g": "10"}).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (tmp_path / "bad.mp4").write_bytes(data)
    source = options().source()
    names = [f"{file.name}@{start:.3f}s" for file in source.files for start in file.starts]
    broken = set()
    for index in range(len(source)):
        try:
            source[index]
        except BrokenClip:
            broken.add(names[index])
    assert broken and broken < {"bad.mp4@0.000s", "bad.mp4@1.000s", "bad.mp4@2.000s"}
    with Loader(source, batch_size=4, seed=0) as loader:
        given = [name for _ in range(5) for name in next(loader)["name"]]
        assert len(given) == 20 and not set(given) & broken
        assert list(loader.broken) == [str(tmp_path / "bad.mp4")]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"fps": 0.0}, "fps"),
        ({"height": -1}, "height"),
        ({"stride": 0.0}, "stride"),
        ({"heldout_every": 1}, "heldout_every: found 1, expected a whole number from 2"),
        ({"fps": float("inf")}, "folder.fps: found inf"),
        ({"stride": 1e-9}, "folder.stride"),
        ({"num_frames": 1_000_001}, "folder.num_frames"),
        ({"height": 1_000_000}, "folder.height"),
    ],
)
def test_impossible_options(options, keywords, message):
    with pytest.raises(ValueError, match=message):
        options(**keywords)


def test_options_travel_through_a_config():
    data = FolderData(path="clips", stride=0.5)
    assert resolve(FolderData, json.loads(json.dumps(to_dict(data)))) == data


def test_real_clips(shared_clips):
    data = FolderData(path=str(shared_clips))
    report = data.scan()
    assert starts(report) == {
        "bigbuckbunny.mp4": [0.0, 2.125],
        "bikes.mp4": [0.0, 2.125, 4.25, 6.375],
        "carphone_pristine.mp4": [0.0],
    }
    assert [name for name, _ in report.rejected] == ["README.md"]
    source = data.source()
    for index in (3, 6):
        video = source[index]["video"]
        assert video.shape == (17, 64, 64, 3) and video.std() > 10
        assert abs(np.diff(video.astype(int), axis=0)).mean() > 0.2  # something moves
