"""The config.json of earlier versions is read."""

import json

import pytest

from vidgen.core.config import to_dict
from vidgen.data.sprites.source import SpritesData
from vidgen.sampling.conditioners import ConcatFrames, FirstFrame
from vidgen.train.experiment import Experiment, load_experiment
from vidgen.train.options import RunOptions
from vidgen.train.text_to_video_task import TextToVideoTask


@pytest.mark.parametrize(
    ("old", "conditioners"),
    [
        ({"images": None, "image_share": 1.0}, ()),
        ({"images": "beside", "image_share": 1.0}, (ConcatFrames(),)),
        ({"images": "first", "image_share": 0.25}, (FirstFrame(probability=0.25),)),
        ({"images": "first"}, (FirstFrame(),)),
    ],
    ids=str,
)
def test_conditioners_were_options_of_images(tmp_path, old, conditioners):
    task = TextToVideoTask(vae="unused")
    experiment = Experiment(task=task, data=SpritesData(), run=RunOptions(num_steps=1, batch_size=1))
    values = to_dict(experiment)
    del values["task"]["conditioners"]
    values["task"] |= old
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_experiment(tmp_path)
    assert loaded.task.conditioners == conditioners
    assert to_dict(loaded) == to_dict(experiment) | {"task": to_dict(loaded.task)}
