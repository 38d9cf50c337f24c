"""Alignment scores on videos that do, or do not do, what was asked."""

import dataclasses

import numpy as np
import pytest

from vidgen.data.sprites.attributes import Motion
from vidgen.data.sprites.captions import canonical
from vidgen.data.sprites.render import render
from vidgen.data.sprites.source import SpritesData
from vidgen.evals.alignment import evaluate_alignment, format_alignment, score_alignment


def draw(scene):
    return render(scene, num_frames=9, height=64, width=64, fps=8.0).video


def altered(scene, **changes):
    return dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, **changes) for o in scene.objects))


@pytest.fixture(scope="module")
def scenes():
    source = SpritesData(num_frames=9, max_objects=1, motions=("left", "up", "still"), seed=2).source()
    return [source.scene(k) for k in range(12)]


def test_what_was_asked_scores_one(scenes):
    table = score_alignment(scenes, [draw(s) for s in scenes])
    assert table.pop("num_clips") == 12
    assert set(table) >= {"colour", "shape", "size", "motion", "direction", "count", "background", "all"}
    assert set(table.values()) == {1.0}


@pytest.mark.parametrize(("name", "value"), [("colour", "cyan"), ("shape", "ring"), ("size", "small")])
def test_one_wrong_attribute_costs_that_attribute(scenes, name, value):
    table = score_alignment(scenes, [draw(altered(s, **{name: value_of(name, value)})) for s in scenes])
    right = np.mean([getattr(s.objects[0], name) == value for s in scenes])
    assert table[name] == pytest.approx(right) and right < 1
    assert {k for k, v in table.items() if v < 1} == {name, "all"}


def value_of(name, value):
    from vidgen.data.sprites.attributes import Shape, Size

    return {"shape": Shape, "size": Size}.get(name, str)(value)


def test_wrong_direction(scenes):
    moving = [s for s in scenes if s.objects[0].motion in (Motion.LEFT, Motion.UP)]
    table = score_alignment(moving, [draw(s)[::-1] for s in moving])
    assert table["direction"] == 0 and table["colour"] == 1 and table["background"] == 1


def test_missing_and_extra_objects():
    source = SpritesData(num_frames=9, min_objects=2, max_objects=2, motions=("still",), seed=4).source()
    two = [source.scene(k) for k in range(6)]
    first = [dataclasses.replace(s, objects=s.objects[:1]) for s in two]
    missing = score_alignment(two, [draw(s) for s in first])
    assert missing["count"] == 0 and missing["colour"] == 0.5
    extra = score_alignment(first, [draw(s) for s in two])
    assert extra["count"] == 0 and extra["colour"] == 1


def test_prompts_reach_the_generator_in_batches(scenes):
    calls = []

    def generate(prompts):
        calls.append(prompts)
        done = sum(len(c) for c in calls) - len(prompts)
        return np.stack([draw(s) for s in scenes[done : done + len(prompts)]])

    table = evaluate_alignment(generate, scenes, batch_size=5)
    assert [len(c) for c in calls] == [5, 5, 2]
    assert [p for c in calls for p in c] == [canonical(s) for s in scenes]
    assert table["all"] == 1
    assert "colour       100.0 %" in format_alignment(table)


def test_errors(scenes):
    with pytest.raises(ValueError, match="1 videos for 2 prompts"):
        evaluate_alignment(lambda prompts: np.zeros((1, 5, 64, 64, 3), np.uint8), scenes, batch_size=2)
    with pytest.raises(ValueError, match="no scenes"):
        score_alignment([], [])
