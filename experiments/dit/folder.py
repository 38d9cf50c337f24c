"""Text to video on a folder of your own videos, over the latents of experiments/vae/folder.py.

Run:       vidgen train --config=experiments/dit/folder.py --config.data.path=DIR --workdir=runs/dit_folder
           --config.task.vae=runs/vae_folder
Arguments: (none) a small transformer at 64 x 64; `tiny` a few steps, for tests.
Hardware:  two CPU cores, minutes to a first picture; an accelerator for more.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments.dit import sprites


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    if arg not in ("", "tiny", "demo"):
        raise ValueError(f"unknown argument {arg!r}: use none, 'demo' or 'tiny'")
    config = sprites.get_config(arg)
    size = {name: config.data[name] for name in ("num_frames", "height", "width", "fps")}
    config.data = {"kind": "folder", "split": "train", "heldout_every": 4, "stride": 0.25, **size}
    config.data.crop = "random"
    config.data.path = placeholder(str)
    return config
