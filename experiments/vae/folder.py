"""Video VAE on a folder of your own videos; the last second of every four is held out.

Run:       vidgen train --config=experiments/vae/folder.py --config.data.path=DIR --workdir=runs/vae_folder
           and, after the same with folder.py:images and --workdir=runs/vae_images, better with
           --config.run.init_from=runs/vae_images; or images and clips of several sizes all at once:
           vidgen train --config=experiments/vae/folder.py:mixed --config.data.path=DIR --workdir=runs/vae
Arguments: (none) a small VAE at 64 x 64; `images` the same on single frames; `mixed` images and clips of two
           lengths by turns, each length in a shape of its own (`config.data.buckets`; of one length there may
           be several shapes, for files that suit them); `demo` 32 x 32; `tiny` a few steps, for tests; for
           another VAE its name in vidgen/models/video_vae/config.py, as `small-8x16x16`; several with commas.
Hardware:  two CPU cores, minutes to a first picture; an accelerator for more.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vidgen.models.video_vae.config import VARIANTS

from . import sprites


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = [word for word in arg.split(",") if word]
    own = {"mixed", *VARIANTS} - {"tiny"}
    if unknown := set(arguments) - own - {"images", "demo", "tiny"}:
        names = ", ".join(["none, images, demo, tiny", *sorted(own)])
        raise ValueError(f"unknown argument {min(unknown)!r}: use {names}")
    config = sprites.get_config(",".join(word for word in arguments if word not in own))
    for name in (own & VARIANTS.keys()).intersection(arguments):
        # Statistics of published weights' latents are of no use to weights of one's own.
        config.task.model = dataclasses.asdict(VARIANTS[name]) | {"latents_mean": (), "latents_std": ()}
    size = {name: config.data[name] for name in ("num_frames", "height", "width", "fps")}
    config.data = {"kind": "folder", "split": "train", "heldout_every": 4, "stride": 0.25, **size}
    config.data.crop = "random"
    config.data.path = placeholder(str)
    if "mixed" in arguments:
        # Frames, height, width, clips per step, share of the steps.
        sizes = [(1, 96, 96, 12, 1.0), (9, 64, 96, 6, 2.0), (17, 64, 64, 4, 1.0)]
        if "tiny" in arguments:
            sizes = [(1, 16, 24, 16, 1.0), (5, 16, 16, 8, 1.0)]
        keys = ("num_frames", "height", "width", "batch_size", "weight")
        config.data.buckets = [dict(zip(keys, values, strict=True)) for values in sizes]
    return config
