"""Video VAE on your folder of videos; the last second of every four is held out.

Run:       vidgen train --config=experiments/vae/folder.py --config.data.path=DIR --workdir=runs/vae_folder
           Better: first train folder.py:images with --workdir=runs/vae_images, then add
           --config.run.init_from=runs/vae_images. Or train on images and clips of several sizes at once:
           vidgen train --config=experiments/vae/folder.py:mixed --config.data.path=DIR --workdir=runs/vae
Arguments: (none) a small VAE at 64 x 64; `images` the same on single frames; `mixed` alternates images and
           clips of two lengths, each length with its own frame size (`config.data.buckets`; one length may
           have several frame sizes, for files that suit them); `demo` 32 x 32; `tiny` a few steps, for tests;
           a name in vidgen/models/video_vae/config.py, such as `small-8x16x16`, for another VAE. Join
           arguments with commas.
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
    here_only = {"mixed", *VARIANTS} - {"tiny"}  # not arguments of sprites.py
    if unknown := set(arguments) - here_only - {"images", "demo", "tiny"}:
        names = ", ".join(["none, images, demo, tiny", *sorted(here_only)])
        raise ValueError(f"unknown argument {min(unknown)!r}: use {names}")
    config = sprites.get_config(",".join(word for word in arguments if word not in here_only))
    for name in (here_only & VARIANTS.keys()).intersection(arguments):
        # The latent statistics of published weights do not apply to new weights.
        config.task.model = dataclasses.asdict(VARIANTS[name]) | {"latents_mean": (), "latents_std": ()}
    size = {name: config.data[name] for name in ("num_frames", "height", "width", "fps")}
    config.data = {"kind": "folder", "split": "train", "heldout_every": 4, "stride": 0.25, **size}
    config.data.crop = "random"
    config.data.path = placeholder(str)
    if "mixed" in arguments:
        # frames, height, width, clips per step, share of the steps
        sizes = [(1, 96, 96, 12, 1.0), (9, 64, 96, 6, 2.0), (17, 64, 64, 4, 1.0)]
        if "tiny" in arguments:
            sizes = [(1, 16, 24, 16, 1.0), (5, 16, 16, 8, 1.0)]
        keys = ("num_frames", "height", "width", "batch_size", "weight")
        config.data.buckets = [dict(zip(keys, values, strict=True)) for values in sizes]
    return config
