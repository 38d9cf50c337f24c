"""The detectors, validated on clips whose truth is known, clean and degraded."""

import collections

import numpy as np
import pytest
from scipy import ndimage

from vidgen.data.sprites.attributes import Backdrop, Motion, Shape, Size
from vidgen.data.sprites.motion import SpriteObject
from vidgen.data.sprites.render import render
from vidgen.data.sprites.scene import Background, Scene
from vidgen.data.sprites.source import SpritesData
from vidgen.evals.detectors import detect

SEEN = 0.6
"""An object is visible in a frame that shows this share of it, and in a clip if a third of the frames do."""


def agreement(num_clips: int, degrade=lambda video: video, **options) -> dict[str, float]:
    """Share of right readings per attribute."""
    source = SpritesData(split="all", **options).source()
    answers = collections.defaultdict(list)
    for index in range(num_clips):
        clip, scene = source[index], source.scene(index)
        found = detect(degrade(clip["video"]))
        truth = scene.background
        answers["background"].append(
            (found.background.colour, found.background.colour_below) == (truth.colour, truth.colour_below)
        )
        answers["backdrop"].append(found.background.kind == truth.kind)
        seen = (clip["visibility"][: len(scene.objects)] > SEEN).mean(axis=1) >= 1 / 3
        if seen.all():
            answers["count"].append(len(found.objects) == len(scene.objects))
        for item in (o for o, visible in zip(scene.objects, seen, strict=True) if visible):
            reading = next((r for r in found.objects if r.colour == item.colour), None)
            answers["colour"].append(reading is not None)
            for name in ("shape", "size", "motion"):
                answers[name].append(getattr(reading, name, None) == getattr(item, name))
    assert all(len(values) >= 0.9 * num_clips for values in answers.values())
    return {name: float(np.mean(values)) for name, values in answers.items()}


def blur_and_noise(video):
    """Worse than a trained autoencoder: sigma 0.7 pixels, noise of 6 in 255."""
    noise = np.random.default_rng(int(video.sum()) % 2**31).normal(0, 6, video.shape)
    soft = ndimage.gaussian_filter(video.astype(np.float32), (0, 0.7, 0.7, 0))
    return np.clip(soft + noise + 0.5, 0, 255).astype(np.uint8)


def clips(few, many):
    return pytest.mark.parametrize("num_clips", [few, pytest.param(many, marks=pytest.mark.slow)])


@clips(30, 80)
def test_one_object_short_clips(num_clips):
    scores = agreement(num_clips, num_frames=9, max_objects=1, seed=11)
    assert min(scores.values()) >= 0.98, scores


@clips(12, 35)
def test_one_object_longer_clips(num_clips):
    scores = agreement(num_clips, num_frames=17, max_objects=1, seed=12)
    assert min(scores.values()) >= 0.98, scores


def test_several_objects():
    scores = agreement(35, num_frames=9, min_objects=2, max_objects=3, seed=13)
    assert scores["count"] >= 0.98 and scores["colour"] >= 0.98, scores
    assert min(scores.values()) >= 0.95, scores


@clips(20, 40)
def test_blurry_and_noisy_clips(num_clips):
    scores = agreement(num_clips, blur_and_noise, num_frames=9, max_objects=1, seed=14)
    assert min(scores.values()) >= 0.95, scores


def test_other_sizes():
    scores = agreement(8, num_frames=9, max_objects=1, seed=15, height=192, width=256)
    assert min(scores.values()) >= 0.98, scores


def scene(*objects: SpriteObject, colour="white") -> Scene:
    return Scene(objects=objects, background=Background(kind=Backdrop.PLAIN, colour=colour))


def draw(what: Scene, num_frames=9):
    return render(what, num_frames=num_frames, height=64, width=64, fps=8.0).video


def thing(shape, colour, motion, start, **rest) -> SpriteObject:
    return SpriteObject(shape=shape, colour=colour, size=Size.SMALL, motion=motion, start=start, **rest)


def test_two_objects_of_one_colour():
    video = draw(
        scene(
            thing(Shape.CIRCLE, "red", Motion.RIGHT, (0.2, 0.2), travel=0.5),
            thing(Shape.STAR, "red", Motion.UP, (0.8, 0.8), travel=0.4),
        )
    )
    found = {(r.colour, r.shape, r.motion) for r in detect(video).objects}
    assert found == {("red", Shape.CIRCLE, Motion.RIGHT), ("red", Shape.STAR, Motion.UP)}


def test_nothing_there():
    found = detect(draw(scene(thing(Shape.CIRCLE, "red", Motion.STILL, (5.0, 5.0)))))
    assert found.objects == () and found.background.colour == "white"


def test_one_frame_reads_as_still():
    found = detect(draw(scene(thing(Shape.CROSS, "blue", Motion.LEFT, (0.5, 0.5))), num_frames=1))
    assert [(r.colour, r.shape, r.size, r.motion) for r in found.objects] == [
        ("blue", Shape.CROSS, Size.SMALL, Motion.STILL)
    ]


def test_a_rim_is_not_an_object():
    """A blurred red disc on white has a pink rim, and a yellow one on blue a green one."""
    disc = SpriteObject(shape=Shape.CIRCLE, colour="red", size=Size.LARGE, motion=Motion.STILL)
    soft = ndimage.gaussian_filter(draw(scene(disc)).astype(np.float32), (0, 1.2, 1.2, 0))
    assert [r.colour for r in detect(soft.astype(np.uint8)).objects] == ["red"]


@pytest.mark.parametrize("level", [0, 255])
def test_empty_frames(level):
    assert detect(np.full((5, 64, 64, 3), level, np.uint8)).objects == ()


def test_noise_does_not_pass_for_a_scene():
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert len(detect(noise).objects) not in (1, 2, 3)


def test_a_saturated_frame_is_background():
    assert detect(np.broadcast_to(np.array([222, 30, 38], np.uint8), (5, 64, 64, 3)).copy()).objects == ()
