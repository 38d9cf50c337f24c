"""Text to video on a folder of your own videos, over the latents of experiments/vae/folder.py.

Run:       vidgen train --config=experiments/dit/folder.py --config.data.path=DIR --workdir=runs/dit_folder
           --config.task.vae=runs/vae_folder
Arguments: (none) a small transformer at 64 x 64; `mixed` alternates images and clips; `stages` images alone,
           then with small, short clips, then with larger and longer ones, all in one run; `demo` 32 x 32;
           `tiny` a few steps, for tests. Join `mixed` or `stages` with `tiny` by a comma.
Hardware:  two CPU cores, minutes to a first picture; an accelerator for more.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from . import sprites


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = set(filter(None, arg.split(",")))
    if unknown := arguments - {"mixed", "stages", "demo", "tiny"}:
        raise ValueError(f"unknown argument {min(unknown)!r}: use none, mixed, stages, demo or tiny")
    tiny = "tiny" in arguments
    config = sprites.get_config(",".join(sorted(arguments - {"mixed", "stages"})))
    size = {name: config.data[name] for name in ("num_frames", "height", "width", "fps")}
    config.data = {"kind": "folder", "split": "train", "heldout_every": 4, "stride": 0.25, **size}
    config.data.crop = "random"
    config.data.path = placeholder(str)
    if arguments & {"mixed", "stages"}:
        sizes = _TINY_SIZES if tiny else _SIZES
        config.data.buckets = [dict(zip(_KEYS, values, strict=True)) for values in sizes]
        # Clips with more tokens need more noise for the same loss of information.
        config.task.density = {"kind": "logit_normal", "shift": {"kind": "root", "base_tokens": 48}}
    if "stages" in arguments:
        ends = (1, 1, None) if tiny else (999, 2499, None)
        starts = (0, 1, 1) if tiny else (0, 500, 1500)
        for bucket, first, last in zip(config.data.buckets, starts, ends, strict=True):
            bucket.update(first_step=first, last_step=last)
    return config


_KEYS = ("num_frames", "height", "width", "batch_size", "weight")
_SIZES = ((1, 64, 64, 32, 1.0), (9, 64, 64, 16, 2.0), (17, 96, 96, 4, 1.0))
_TINY_SIZES = ((1, 16, 16, 16, 1.0), (5, 16, 16, 8, 1.0), (9, 16, 32, 8, 1.0))
"""Buckets of `tiny`; the columns are `_KEYS`."""
