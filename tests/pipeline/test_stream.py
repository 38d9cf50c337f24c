"""Sampling step by step: progress, previews, and stopping, with random weights."""

import pathlib
import sys

import numpy as np
import pytest

import vidgen
from tests.sampling.tiny_pipeline import OPTIONS, SIZE, make_model, make_pipeline, make_vae
from vidgen.core.errors import UserError
from vidgen.models.dit.model import DiT
from vidgen.pipeline import Request, pipeline
from vidgen.sampling.sampler import SamplerState

STEPS = OPTIONS.grid.num_steps


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(make_model(), make_vae())


@pytest.fixture(scope="module")
def video(pipe):
    return pipe("a dog", seed=3)


def test_events_are_the_steps_and_the_decoding_and_the_last_has_the_videos(pipe, video):
    events = list(pipe.stream(Request(prompt="a dog", seed=3)))
    stages = [("step", step) for step in range(STEPS)] + [("decoding", STEPS), ("done", STEPS)]
    assert [(event.stage, event.step) for event in events] == stages
    assert {event.num_steps for event in events} == {STEPS}
    *before, done = events
    assert all(event.videos is None for event in before)
    np.testing.assert_array_equal(done.videos, video[None])
    (only,) = pipe.stream(Request(prompt="a dog", seed=3), progress=False)
    assert only.stage == "done"
    np.testing.assert_array_equal(only.videos, done.videos)


def test_previews_come_near_the_videos(pipe, video):
    request = Request(prompt="a dog", seed=3, steps=8)
    events = list(pipe.stream(request, preview_every=2))
    previews = {event.step: event.videos for event in events[:-2] if event.videos is not None}
    assert list(previews) == [2, 4, 6]
    result = events[-1].videos.astype(int)
    assert {preview.shape for preview in previews.values()} == {(1, *SIZE, 3)}
    distances = [np.abs(preview - result).mean() for preview in previews.values()]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.5 * distances[0], distances
    np.testing.assert_array_equal(result[0], pipe("a dog", seed=3, steps=8))


def test_closing_the_iterator_cancels_the_rest(pipe, video, monkeypatch):
    run = []

    class Recorded:
        num_steps = STEPS

        def init(self):
            run.append("init")
            return SamplerState(np.zeros(1), (), ())

        def step(self, state, number):
            run.append(int(number))
            return state

        def decode(self, patches):
            pytest.fail("the videos are decoded")

    monkeypatch.setattr(pipeline, "make_programs", lambda *_, **__: Recorded())
    events = pipe.stream(Request(prompt="a dog"))
    assert next(events).step == 0 and run == ["init"]
    assert next(events).step == 1
    events.close()
    assert list(events) == [] and run == ["init", 0]


def test_few_calls_lie_between_the_pipeline_and_the_transformer(pipe, monkeypatch):
    class Seen(Exception):
        """Ends the call before anything is compiled."""

    def recorded(*_, **__):
        root, frame, found = str(pathlib.Path(vidgen.__file__).parent), sys._getframe(1), ["DiT.__call__"]
        while frame is not None:
            if frame.f_code.co_filename.startswith(root):
                found.append(frame.f_code.co_qualname)
            frame = frame.f_back
        raise Seen(found)

    monkeypatch.setattr(DiT, "__call__", recorded)
    with pytest.raises(Seen) as seen:
        pipe("a dog", num_frames=1)
    (found,) = seen.value.args
    assert found.index("Pipeline.__call__") <= 6, found


def test_wrong_requests_are_errors(pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'frames'"):
        pipe("a dog", frames=3)
    for fields, message in (
        ({"prompt": []}, "found no prompt"),
        ({"prompt": "a\0"}, "prompt: character 1 is a NUL character"),
        ({"prompt": "a", "negative_prompt": "\0"}, "negative_prompt: character 0 is a NUL character"),
    ):
        with pytest.raises(UserError, match=message):
            Request(**fields)
    picture = np.zeros((8, 8, 3), np.uint8)
    for fields, message in (
        ({"image": picture}, "the model takes no image; leave it out, or load another model"),
        ({"last_image": picture}, "the model takes no last_image"),
        (
            {"noise": np.zeros((1, 2, 4, 4, 3), np.float32)},
            r"noise has the shape \(1, 2, 4, 4, 3\); expected",
        ),
    ):
        with pytest.raises(UserError, match=message):
            next(pipe.stream(Request(prompt="a dog", **fields)))
