import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vidgen.core.config import resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.data.buckets import training_clips
from vidgen.data.folder import FolderData
from vidgen.data.loader import Loader
from vidgen.data.source import BrokenClip, ClipSource
from vidgen.data.tfds_builder import build_records
from vidgen.data.tfds_clips import ArrayRecordData, decode_record, encode_record
from vidgen.data.tfds_folder import records_folder


class Noise:
    """Clips of noise with everything that a source may give."""

    def __init__(self, count=4, broken=(), size=(17, 23)):
        self.count, self.broken, self.size = count, broken, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenClip(f"noise-{index}", "no picture")
        rng = np.random.default_rng(index)
        return {
            "video": rng.integers(0, 256, (3, *self.size, 3), np.uint8),
            "caption": f'"été" {index}',
            "name": f"noise-{index}",
            "boxes": rng.random((2, 3, 4), np.float32),
            "seen": rng.random((2, 3)) > 0.5,
            "count": np.int64([index]),
            "attributes": json.dumps({"n": index}),
        }


def stored(path, split="train", size=(17, 23)):
    """The records of `Noise`, as they were stored."""
    data = ArrayRecordData(path=str(path), split=split, num_frames=3, height=size[0], width=size[1], fps=8.0)
    return data.source()


def assert_same(first, second):
    assert list(first) == list(second)
    for key, value in first.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == second[key].dtype, key
            np.testing.assert_array_equal(value, second[key])
        else:
            assert value == second[key]


def test_round_trip_without_tensorflow(tmp_path):
    sources = {"train": Noise(5), "heldout": Noise(2, size=(16, 16))}
    report = build_records(sources, tmp_path / "out", fps=8.0, encoding="lossless")
    assert report.num_clips == {"train": 5, "heldout": 2} and report.broken == {}
    for path in (tmp_path / "out", report.folder):
        for split, source in sources.items():
            back = stored(path, split, source.size)
            assert isinstance(back, ClipSource) and len(back) == len(source)
            for index in range(len(source)):
                assert_same(source[index], back[index])
    with pytest.raises(IndexError):
        back[2]
    assert "tensorflow" not in sys.modules


def test_tfds_alone_can_read_the_records(tmp_path):
    report = build_records({"train": Noise(2)}, tmp_path, fps=8.0, encoding="lossless")
    records = tfds.builder_from_directory(str(report.folder)).as_data_source(split="train")
    assert set(records[1]) == {"clip", "caption", "name", "metadata"}
    assert records[1]["clip"][4:8] == b"ftyp"
    metadata = json.loads(records[1]["metadata"])
    assert (metadata["fps"], metadata["num_frames"], metadata["height"], metadata["width"]) == (
        8.0,
        3,
        17,
        23,
    )
    assert all(path.name.endswith(("json", "-00001")) for path in report.folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["vidgen_clips"]


def test_a_loader_reads_records(tmp_path):
    build_records({"train": Noise(5)}, tmp_path, fps=8.0, encoding="lossless")
    with Loader(stored(tmp_path), batch_size=3, seed=0) as loader:
        batch = next(loader)
    assert batch["video"].shape == (3, 3, 17, 23, 3) and batch["boxes"].shape == (3, 2, 3, 4)
    index = int(batch["name"][0].removeprefix("noise-"))
    np.testing.assert_array_equal(batch["video"][0], Noise()[index]["video"])


def test_folder_clips_compressed(tmp_path, numbered_video, number_of):
    numbered_video("a.mp4", 50)
    (tmp_path / "a.txt").write_text("numbers")
    source = FolderData(path=str(tmp_path), num_frames=5, fps=5.0, height=17, width=33).source()
    build_records({"train": source}, tmp_path / "out", fps=5.0, encoding="h264")
    back = ArrayRecordData(path=str(tmp_path / "out"), num_frames=5, fps=5.0, height=17, width=33).source()
    assert len(back) == 2 and back[1]["caption"] == "numbers" and back[1]["name"] == "a.mp4@1.000s"
    assert back[1]["video"].shape == (5, 17, 33, 3)
    assert abs(back[1]["video"].astype(int) - source[1]["video"]).mean() < 3


def test_other_length_rate_and_size_on_reading():
    record = encode_record({**Noise(size=(32, 32))[0]}, fps=8.0, encoding="lossless")
    clip = decode_record(record, num_frames=2, fps=4.0, height=16, width=8)
    assert clip["video"].shape == (2, 16, 8, 3)
    every_other = decode_record(record, num_frames=2, fps=4.0)["video"]
    np.testing.assert_array_equal(every_other, Noise(size=(32, 32))[0]["video"][::2])
    with pytest.raises(BrokenClip, match="noise-0: only 3 of 4 frames"):
        decode_record(record, num_frames=4)


def test_a_damaged_record_is_a_broken_clip():
    record = encode_record(Noise()[1], fps=8.0, encoding="lossless")
    with pytest.raises(BrokenClip, match="noise-1"):
        decode_record({**record, "clip": record["clip"][:100]})


def test_broken_clips_are_left_out_and_reported(tmp_path):
    report = build_records({"train": Noise(4, broken=(1,))}, tmp_path, fps=8.0, encoding="lossless")
    assert report.num_clips == {"train": 3} and report.broken == {"noise-1": "no picture"}
    back = stored(tmp_path)
    assert [back[index]["name"] for index in range(3)] == ["noise-0", "noise-2", "noise-3"]


def test_a_source_of_broken_clips_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r'"train".*none of its 2 clips.*no picture'):
        build_records({"train": Noise(2, broken=(0, 1))}, tmp_path / "out", fps=8.0, encoding="lossless")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_failure_leaves_no_records(tmp_path):
    class Failing(Noise):
        def __getitem__(self, index):
            if index == 2:
                raise KeyError("a defect")
            return super().__getitem__(index)

    with pytest.raises(KeyError):
        build_records({"train": Failing()}, tmp_path, fps=8.0, encoding="lossless")
    with pytest.raises(FileNotFoundError, match="vidgen data build"):
        records_folder(tmp_path)
    assert build_records({"train": Noise(1)}, tmp_path, fps=8.0, encoding="lossless").num_clips == {
        "train": 1
    }


def test_records_are_not_overwritten(tmp_path):
    build_records({"train": Noise(1)}, tmp_path, fps=8.0, encoding="lossless")
    with pytest.raises(FileExistsError, match="records here already"):
        build_records({"train": Noise(1)}, tmp_path, fps=8.0, encoding="lossless")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no records here \(no dataset_info\.json\)"):
        ArrayRecordData(path=str(tmp_path)).source()
    build_records({"train": Noise(2)}, tmp_path, fps=8.0, encoding="lossless")
    with pytest.raises(ValueError, match='no split "test"; there are: train'):
        ArrayRecordData(path=str(tmp_path), split="test").source()
    with pytest.raises(ValueError, match=r"the first clip cannot be read as asked.*only 3 of 9 frames"):
        ArrayRecordData(path=str(tmp_path), num_frames=9).source()
    with pytest.raises(ValueError, match="cannot store 'x' of a clip: dict"):
        encode_record({**Noise()[0], "x": {}}, fps=8.0, encoding="lossless")


def test_impossible_options():
    with pytest.raises(ValueError, match=r"array_record\.fps: found 0"):
        ArrayRecordData(path="records", fps=0.0)


def test_options_travel_through_a_config():
    data = ArrayRecordData(path="records", num_frames=9)
    assert resolve(ArrayRecordData, json.loads(json.dumps(to_dict(data)))) == data


def test_records_in_buckets(tmp_path):
    build_records({"train": Noise(5)}, tmp_path, fps=8.0, encoding="lossless")
    sizes = ({"height": 8, "width": 8, "batch_size": 4}, {"num_frames": 3, "height": 17, "width": 23})
    data = resolve(ArrayRecordData, {"path": str(tmp_path), "buckets": list(sizes)})
    with Loader(training_clips(data), batch_size=2, seed=0) as loader:
        batches = [next(loader) for _ in range(6)]
    assert {batch["video"].shape for batch in batches} == {(4, 1, 8, 8, 3), (2, 3, 17, 23, 3)}
    long = resolve(
        ArrayRecordData, {"path": str(tmp_path), "buckets": [{"num_frames": 9, "height": 8, "width": 8}]}
    )
    with pytest.raises(ValueError, match=r"bucket 0 \(9 x 8 x 8\): .*only 3 of 9 frames"):
        training_clips(long)


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("features.json", "text_feature.Text", "text_feature.Other", "expected texts alone"),
        ("features.json", "{", "[", "not JSON"),
        ("features.json", "featuresDict", "x", "is damaged"),
        ("dataset_info.json", '"3"', '"x"', "is damaged"),
        ("dataset_info.json", '"3"', "", "is damaged"),
        ("dataset_info.json", "{DATASET}-", "../", "in the name of a file"),
        ("dataset_info.json", '"name": "train"', '"name": "../train"', "in the name of a file"),
    ],
)
def test_damaged_json_of_records_is_named(tmp_path, file, old, new, told):
    build_records({"train": Noise(3)}, tmp_path, fps=8.0, encoding="h264")
    path = records_folder(tmp_path) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"{file}.*{told}"):
        stored(tmp_path)
