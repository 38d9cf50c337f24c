"""Data of one's own: clips of a bar that moves across the frame.

vidgen train --config examples/data.py --workdir runs/bars
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from vidgen.data.training_data import VideoData
from vidgen.experiments.vae import sprites


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars(VideoData):
    """A `vidgen.data.training_data.TrainingData`: options of the clips."""

    num_clips: int = 1000
    num_frames: int = 5
    height: int = 16
    width: int = 16
    fps: float = 8.0

    def source(self):
        return BarClips(self)


class BarClips:
    """A `vidgen.data.source.ClipSource`: reading is deterministic in the index and thread-safe."""

    def __init__(self, data: Bars):
        self.data = data

    def __len__(self):
        return self.data.num_clips

    def __getitem__(self, index):
        data, rng = self.data, np.random.default_rng(index)
        colour, start = rng.integers(64, 256, 3), rng.integers(data.width)
        video = np.zeros((data.num_frames, data.height, data.width, 3), np.uint8)
        for frame in range(data.num_frames):
            video[frame, :, (start + frame) % data.width] = colour
        return {"video": video, "caption": "a bar moves right", "name": f"bar-{index}"}


def get_config(arg: str = "tiny") -> ConfigDict:
    """The sprites VAE, trained on these clips."""
    config = sprites.get_config(arg)
    with config.unlocked(), config.ignore_type():
        config.data = Bars()
    return config
