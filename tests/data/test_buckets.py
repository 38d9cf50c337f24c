import collections
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.data.buckets import Bucket, Mixture, fitting_sizes, training_clips, training_sizes
from vidgen.data.folder import FolderData
from vidgen.data.loader import Loader
from vidgen.data.source import BrokenClip
from vidgen.data.sprites.source import SpritesData


class Named:
    """Clips of a bucket's size, whose name is the bucket and the index; some may be broken."""

    def __init__(self, bucket, count, broken=()):
        self.bucket, self.count, self.broken = bucket, count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenClip(f"{self.bucket} {index}", "no picture")
        size = (self.bucket.num_frames, self.bucket.height, self.bucket.width, 3)
        return {"video": np.full(size, index, np.uint8), "name": f"{self.bucket} {index}"}


IMAGES = Bucket(height=4, width=4, batch_size=8, weight=1.0)
WIDE = Bucket(num_frames=5, height=4, width=6, weight=2.0)
LONG = Bucket(num_frames=9, height=2, width=2, batch_size=2, weight=0.5)


def mixture(broken=()):
    counts = ((IMAGES, 20), (WIDE, 10), (LONG, 7))
    return Mixture(tuple((bucket, Named(bucket, count, broken)) for bucket, count in counts))


def names(steps=28, state=None, source=None, **keywords):
    with Loader(source or mixture(), **{"batch_size": 4, "seed": 3, **keywords}) as loader:
        if state is not None:
            loader.set_state(state)
        return [next(loader)["name"] for _ in range(steps)]


def bucket_of(batch):
    (only,) = {name.rsplit(" ", 1)[0] for name in batch}
    return only


def test_each_step_takes_its_whole_batch_from_one_bucket():
    with Loader(mixture(), batch_size=4, seed=0) as loader:
        batches = [next(loader) for _ in range(14)]
    shapes = {bucket_of(batch["name"]): batch["video"].shape for batch in batches}
    assert shapes == {
        "1 x 4 x 4": (8, 1, 4, 4, 3),
        "5 x 4 x 6": (4, 5, 4, 6, 3),
        "9 x 2 x 2": (2, 9, 2, 2, 3),
    }


def test_turns_follow_the_weights_evenly():
    turns = [bucket_of(batch) for batch in names(70)]
    assert collections.Counter(turns) == {"1 x 4 x 4": 20, "5 x 4 x 6": 40, "9 x 2 x 2": 10}
    weights = {str(bucket): bucket.weight / 3.5 for bucket in (IMAGES, WIDE, LONG)}
    for step in range(1, 71):
        for bucket, share in weights.items():
            assert abs(turns[:step].count(bucket) - share * step) < 1.5


def test_every_bucket_goes_through_its_clips_in_shuffled_epochs():
    sequences = collections.defaultdict(list)
    for batch in names(70):
        sequences[bucket_of(batch)] += batch
    for bucket, count in (("1 x 4 x 4", 20), ("5 x 4 x 6", 10), ("9 x 2 x 2", 7)):
        first, second = sequences[bucket][:count], sequences[bucket][count : 2 * count]
        assert len(set(first)) == count and sorted(first) == sorted(second) and first != second


def test_order_depends_on_the_seed_alone():
    assert names() == names(num_threads=0, prefetch=0) == names(num_threads=4, prefetch=1)
    assert names() != names(seed=4)
    assert [bucket_of(batch) for batch in names()] == [bucket_of(batch) for batch in names(seed=4)]


def test_the_first_bucket_alone_has_the_order_of_its_source_alone():
    alone = [batch for batch in names() if bucket_of(batch) == "1 x 4 x 4"]
    assert alone == names(len(alone), source=Named(IMAGES, 20), batch_size=8)


def test_processes_share_the_batches_of_one():
    parts = [names(process_index=index, process_count=2) for index in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == names()


@pytest.mark.parametrize("steps", [range(0, 20, 4), pytest.param(range(20), marks=pytest.mark.slow)], ids=str)
def test_resume_is_exact_at_every_step_and_with_other_processes(steps):
    whole = names()
    for step in steps:
        with Loader(mixture(), batch_size=4, seed=3, process_count=2) as loader:
            for _ in range(step):
                next(loader)
            state = json.loads(json.dumps(loader.get_state()))
        assert state == {"next_index": 8 * step, "num_clips": 37, "seed": 3}
        assert names(8, state) == whole[step : step + 8]


def staged():
    """Images alone, then images and wide clips by turns, then long clips alone."""
    buckets = (
        dataclasses.replace(IMAGES, last_step=9),
        dataclasses.replace(WIDE, first_step=4, last_step=9),
        dataclasses.replace(LONG, first_step=10),
    )
    return Mixture(tuple((bucket, Named(bucket, 20)) for bucket in buckets))


def test_stages_follow_one_another_in_one_run_and_resume_is_exact_in_each():
    whole = names(16, source=staged())
    turns = [bucket_of(batch) for batch in whole]
    assert turns[:4] == ["1 x 4 x 4"] * 4 and turns[10:] == ["9 x 2 x 2"] * 6
    assert collections.Counter(turns[4:10]) == {"1 x 4 x 4": 2, "5 x 4 x 6": 4}
    with Loader(staged(), batch_size=4, seed=3) as loader:
        for step in range(15):
            assert names(16 - step, loader.get_state(), staged()) == whole[step:]
            next(loader)
        assert loader.num_clips == 60


def test_stages_leave_no_step_without_a_bucket():
    late = Mixture(((dataclasses.replace(WIDE, first_step=5), Named(WIDE, 4)),))
    with pytest.raises(ValueError, match="no bucket takes part in step 0: change first_step"):
        Loader(late, batch_size=4, seed=0)
    short = Mixture(((dataclasses.replace(WIDE, last_step=5), Named(WIDE, 4)),))
    with pytest.raises(ValueError, match="no bucket takes part in step 6"):
        Loader(short, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="first_step is 6 and last_step 5"):
        dataclasses.replace(WIDE, first_step=6, last_step=5)


def test_broken_clips_are_replaced_by_clips_of_their_bucket():
    batches = names(source=mixture(broken=(1, 2)))
    assert all(bucket_of(batch) for batch in batches)
    assert not {name for batch in batches for name in batch if name.endswith((" 1", " 2"))}
    split = [names(source=mixture(broken=(1, 2)), process_index=i, process_count=2) for i in range(2)]
    assert [first + second for first, second in zip(*split, strict=True)] == batches


def test_numbers_that_do_not_fit_name_the_bucket():
    with pytest.raises(ValueError, match=r"bucket 2 \(9 x 2 x 2\): batch_size is 2, which 4 processes"):
        Loader(mixture(), batch_size=4, seed=0, process_count=4)
    with pytest.raises(ValueError, match=r"bucket 0 \(5 x 4 x 6\): the source of clips is empty"):
        Loader(Mixture(((WIDE, Named(WIDE, 0)),)), batch_size=4, seed=0)
    for wrong in ({"height": 0}, {"weight": 0.0}, {"weight": float("nan")}, {"batch_size": -1}):
        with pytest.raises(ValueError, match=rf"\.{next(iter(wrong))}: found .*, expected a"):
            Bucket(**{"height": 4, "width": 4, **wrong})


def test_buckets_come_from_a_config_and_go_into_one():
    values = {
        "num_clips": 4,
        "buckets": [{"height": 16, "width": 24}, {"num_frames": 5, "height": 8, "width": 8}],
    }
    data = resolve(SpritesData, values)
    assert data.buckets == (Bucket(height=16, width=24), Bucket(num_frames=5, height=8, width=8))
    assert resolve(SpritesData, json.loads(json.dumps(to_dict(data)))) == data
    with pytest.raises(ConfigError, match=r'config\.buckets\[0\]\.hight: unknown key.*did you mean "height"'):
        resolve(SpritesData, {"buckets": [{"hight": 16, "width": 24}]})
    with pytest.raises(
        ConfigError, match=r"config\.buckets\[1\]\.width: found 0 .*expected a whole number from 1"
    ):
        resolve(SpritesData, {"buckets": [{"height": 8, "width": 8}, {"height": 8, "width": 0}]})


def test_sizes_of_training_with_and_without_buckets():
    data = SpritesData(num_frames=9, height=16, width=24)
    assert training_sizes(data, 6) == (Bucket(num_frames=9, height=16, width=24, batch_size=6),)
    mixed = SpritesData(buckets=(IMAGES, WIDE))
    assert [size.batch_size for size in training_sizes(mixed, 6)] == [8, 6]


def test_sprites_in_buckets():
    data = SpritesData(num_clips=3, buckets=(IMAGES, WIDE))
    with Loader(training_clips(data), batch_size=2, seed=0) as loader:
        assert {next(loader)["video"].shape for _ in range(6)} == {(8, 1, 4, 4, 3), (2, 5, 4, 6, 3)}


@pytest.mark.parametrize(
    ("shown", "sizes", "expected"),
    [
        ((1080, 1920), [(256, 256), (256, 448), (448, 256)], (1,)),
        ((1080, 1920), [(480, 832), (720, 1280), (256, 448)], (0, 1, 2)),  # alike in shape, none enlarges
        ((480, 854), [(480, 832), (720, 1280), (256, 448)], (0, 2)),  # 720 lines would enlarge it
        ((200, 350), [(720, 1280), (480, 832)], (1,)),  # both would: the one that does so least
        ((64, 64), [(64, 64), (32, 32), (64, 128)], (0, 1)),
        ((576, 720 * 16 / 15), [(48, 64), (48, 60)], (0,)),  # 4:3 by its pixels' aspect
    ],
)
def test_which_sizes_a_picture_is_good_for(shown, sizes, expected):
    assert fitting_sizes(shown, sizes) == expected


def bucket(num_frames, height, width, **more):
    return Bucket(num_frames=num_frames, height=height, width=width, **more)


@pytest.fixture
def folder(numbered_video, tmp_path):
    """A wide video of two seconds, a high one of one second, a wide and a high image."""
    numbered_video("wide.mp4", 50, height=32, width=64)
    numbered_video("high.mp4", 26, height=64, width=32)
    Image.new("RGB", (128, 64), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (32, 64), "blue").save(tmp_path / "high.png")

    def make(*buckets, **keywords):
        return FolderData(path=str(tmp_path), fps=5.0, buckets=buckets, **keywords)

    return make


def used(report):
    return {file.name: len(file.starts) for file in report.used}


def test_files_go_to_the_buckets_that_suit_them(folder):
    data = folder(
        bucket(1, 16, 32),
        bucket(1, 32, 16),
        bucket(5, 16, 32),
        bucket(5, 32, 16),
        bucket(9, 16, 16),
        stride=1.0,
    )
    reports = [used(report) for report in data.scan_buckets()]
    assert reports == [
        {"wide.mp4": 2, "wide.png": 1},
        {"high.mp4": 1, "high.png": 1},
        {"wide.mp4": 2},
        {"high.mp4": 1},
        {"wide.mp4": 1},  # the high one is too short
    ]
    sources = data.bucket_sources()
    for source, size in zip(sources, data.buckets, strict=True):
        for index in range(len(source)):
            assert source[index]["video"].shape == (size.num_frames, size.height, size.width, 3)
    assert dict(data.scan_buckets()[0].rejected)["high.png"] == "suits another bucket better"


def test_videos_may_be_kept_out_of_the_images(folder):
    data = folder(bucket(1, 16, 16), bucket(5, 16, 16), images_from_videos=False)
    assert [used(report) for report in data.scan_buckets()] == [
        {"high.png": 1, "wide.png": 1},
        {"high.mp4": 1, "wide.mp4": 2},
    ]
    assert "images_from_videos is off" in dict(data.scan_buckets()[0].rejected)["wide.mp4"]


def test_small_sizes_take_large_files_and_large_sizes_no_small_files(folder):
    data = folder(bucket(1, 32, 64), bucket(1, 64, 128), bucket(1, 64, 32), images_from_videos=True)
    assert [set(used(report)) for report in data.scan_buckets()] == [
        {"wide.mp4", "wide.png"},
        {"wide.png"},
        {"high.mp4", "high.png"},
    ]


def test_a_bucket_that_no_file_suits_is_named(folder):
    with pytest.raises(ValueError, match=r"bucket 1 \(17 x 16 x 16\): no clip of 17 frames.*too short"):
        folder(bucket(1, 16, 16), bucket(17, 16, 16)).bucket_sources()
    with pytest.raises(ValueError, match=r"bucket 0 \(1 x 64 x 64\).*suits another bucket better"):
        folder(bucket(1, 64, 64), bucket(1, 32, 64), bucket(1, 64, 32)).bucket_sources()


def test_no_training_clip_of_any_bucket_shows_a_held_out_second(folder, numbered_video):
    numbered_video("long.mp4", 250)
    sizes = (bucket(1, 16, 32), bucket(5, 16, 32), bucket(9, 16, 32))
    for data, report in zip(
        sizes, folder(*sizes, split="train", heldout_every=4).scan_buckets(), strict=True
    ):
        (file,) = (file for file in report.used if file.name == "long.mp4")
        for start in file.starts:
            seconds = range(int(start + 1e-6), int(np.ceil(start + data.num_frames / 5 - 1e-6)))
            assert not {3, 7} & set(seconds)


def test_what_no_bucket_uses_is_logged_once(folder, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_text("not a video")
    sources = folder(bucket(1, 16, 32), bucket(1, 32, 16), bucket(5, 16, 32)).bucket_sources()
    assert len(sources) == 3
    assert "1 files are not used: bad.mp4: cannot be opened" in caplog.text
    assert "suits another" not in caplog.text
