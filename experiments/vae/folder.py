"""Video VAE on a folder of your own videos; the last second of every four is held out.

Run:       vidgen train --config=experiments/vae/folder.py --config.data.path=DIR --workdir=runs/vae_folder
           and, after the same with folder.py:images and --workdir=runs/vae_images, better with
           --config.run.init_from=runs/vae_images
Arguments: (none) a small VAE at 64 x 64; `images` the same on single frames; `tiny` a few steps, for tests.
Hardware:  two CPU cores, minutes to a first picture; an accelerator for more.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments.vae import sprites


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    config = sprites.get_config(arg)
    size = {name: config.data[name] for name in ("num_frames", "height", "width", "fps")}
    config.data = {"kind": "folder", "split": "train", "heldout_every": 4, "stride": 0.25, **size}
    config.data.crop = "random"
    config.data.path = placeholder(str)
    return config
