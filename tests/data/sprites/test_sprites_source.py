"""The sprite world as a source: determinism, shapes, splits, options."""

import json

import numpy as np
import pytest

from vidgen.data.source import ClipSource
from vidgen.data.sprites.attributes import COLOURS, Motion, Shape, Size, colour_shape_pairs
from vidgen.data.sprites.source import SpritesData


def test_clips_depend_on_seed_and_index_alone():
    first, again = SpritesData(seed=3, num_clips=20).source(), SpritesData(seed=3, num_clips=9).source()
    for index in (7, 0, 7):
        a, b = first[index], again[index]
        np.testing.assert_array_equal(a["video"], b["video"])
        assert {k: v for k, v in a.items() if isinstance(v, str)} == {
            k: v for k, v in b.items() if isinstance(v, str)
        }
    other = SpritesData(seed=4).source()
    assert other[7]["attributes"] != first[7]["attributes"]
    assert first[6]["attributes"] != first[7]["attributes"]


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps"),
    [(1, 64, 64, 8.0), (9, 48, 80, 8.0), (33, 96, 64, 24.0), (5, 37, 53, 4.0)],
)
def test_any_size(frames, height, width, fps):
    source = SpritesData(num_frames=frames, height=height, width=width, fps=fps, num_clips=12).source()
    assert isinstance(source, ClipSource)
    for index in range(12):
        clip = source[index]
        assert clip["video"].shape == (frames, height, width, 3) and clip["video"].dtype == np.uint8
        assert clip["boxes"].shape == (3, frames, 4) and clip["boxes"].dtype == np.float32
        assert clip["visibility"].shape == (3, frames) and clip["visibility"].dtype == np.float32
        assert clip["name"] == f"sprites-0-{index}"
        assert clip["boxes"].min() >= 0 and clip["boxes"].max() <= 1
        assert clip["visibility"].min() >= 0 and clip["visibility"].max() <= 1 + 1e-5
        count = len(json.loads(clip["attributes"])["objects"])
        assert not clip["boxes"][count:].any() and clip["boxes"][:count].any(axis=(1, 2)).all()


def test_same_scene_at_twice_the_frame_rate():
    slow = SpritesData(num_frames=9, fps=8.0).source()
    fast = SpritesData(num_frames=17, fps=16.0).source()
    for index in range(10):
        np.testing.assert_array_equal(fast[index]["video"][::2], slow[index]["video"])


def test_held_out_pairs_cover_each_colour_and_shape_once():
    train, heldout = set(colour_shape_pairs("train")), set(colour_shape_pairs("heldout"))
    assert not train & heldout and train | heldout == set(colour_shape_pairs("all"))
    assert len(heldout) == len(COLOURS) * len(Shape) // 8
    assert sorted(c for c, _ in heldout) == sorted(COLOURS)
    assert sorted(s for _, s in heldout) == sorted(Shape)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_splits_hold_for_every_object(split):
    source = SpritesData(split=split, max_objects=3).source()
    allowed = set(colour_shape_pairs(split))
    seen = {(item.colour, item.shape) for k in range(300) for item in source.scene(k).objects}
    assert seen <= allowed
    assert len(seen) >= 0.9 * len(allowed)


def test_options_restrict_the_world():
    source = SpritesData(
        min_objects=2,
        max_objects=2,
        motions=("left", "spin"),
        sizes=("small", "large"),
        backgrounds=("plain",),
    ).source()
    for index in range(60):
        scene = source.scene(index)
        assert len(scene.objects) == 2 and scene.background.kind == "plain" and scene.camera == "static"
        assert {item.motion for item in scene.objects} <= {Motion.LEFT, Motion.SPIN}
        assert {item.size for item in scene.objects} <= {Size.SMALL, Size.LARGE}
        assert not any(item.motion is Motion.SPIN and item.shape.is_round for item in scene.objects)
        assert len({item.colour for item in scene.objects}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motions": ("sideways",)}, "sideways.*left, right"),
        ({"sizes": ("huge",)}, "huge.*small, medium, large"),
        ({"max_objects": 4}, "max_objects 4"),
        ({"num_frames": 0}, r"sprites\.num_frames: found 0"),
        ({"cameras": ("pan_left",)}, "textured"),
        ({"fps": float("nan")}, r"sprites\.fps: found nan"),
        ({"height": 10**7}, r"sprites\.height: found 10000000"),
        ({"num_clips": 0}, r"sprites: num_clips is 0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpritesData(**options)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="clip 5 of 5"):
        SpritesData(num_clips=5).source()[5]
