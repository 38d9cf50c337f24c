"""Video VAE on the sprite world: 4 x 8 x 8 compression of 64 x 64 clips.

Run:       vidgen train --config=experiments/vae/sprites.py --workdir=runs/vae
           after the same with `sprites.py:images --workdir=runs/vae_images`, and with
           --config.run.init_from=runs/vae_images: shapes are learned from images, then motion from clips.
Arguments: (none) the full run; `images` its first half, on images; `demo` 32 x 32, minutes on two CPU cores;
           `tiny` a few steps, for tests.
Hardware:  two CPU cores, an hour; any accelerator, minutes.
Expect:    docs/log.md has the PSNR on held-out sprites.
"""

import dataclasses

from ml_collections import ConfigDict

from vidgen.models.video_vae.config import VARIANTS


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    config = ConfigDict()
    config.task = {"kind": "vae", "model": dataclasses.asdict(VARIANTS["nano"]), "kl_weight": 1e-3}
    config.data = {
        "kind": "sprites",
        "num_frames": 5,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "max_objects": 2,
        "cameras": ("static",),
    }
    config.data.backgrounds = ("plain",)
    config.optimizer = {"kind": "muon", "learning_rate": 4e-3, "warmup_steps": 50, "end_fraction": 0.02}
    config.run = {
        "num_steps": 1000,
        "batch_size": 8,
        "log_every": 25,
        "checkpoint_every": 100,
        "eval_every": 200,
    }
    config.mesh = {"data": -1}
    if arg == "images":
        config.data.update(num_frames=1, max_objects=3)
        config.run.update(num_steps=1600, batch_size=32, eval_every=500)
    elif arg == "demo":
        config.task.model = dataclasses.asdict(VARIANTS["tiny"])
        config.data.update(height=32, width=32, max_objects=1, backgrounds=("plain",))
        config.run.update(num_steps=400, batch_size=16, log_every=20, eval_every=400)
        config.run.ema_decay = 0.99
    elif arg == "tiny":
        config.optimizer = {"kind": "adamw"}
        config.task.model = dataclasses.asdict(VARIANTS["tiny"])
        config.data.update(height=16, width=16, num_clips=64)
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    elif arg:
        raise ValueError(f"unknown argument {arg!r}: use none, 'images', 'demo' or 'tiny'")
    return config
