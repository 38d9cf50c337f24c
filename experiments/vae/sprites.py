"""Video VAE on the sprite world, 4 x 8 x 8: trained on images for shapes, then on 64 x 64 clips for motion.

Run:       vidgen train --config=experiments/vae/sprites.py:images --workdir=runs/vae_images
           vidgen train --config=experiments/vae/sprites.py --workdir=runs/vae
           --config.run.init_from=runs/vae_images
Arguments: (none) clips; `images` one-frame clips; `demo` 32 x 32, minutes on two CPU cores; `tiny` a few
           steps, for tests; also `demo,images` and `tiny,images`.
Hardware:  two CPU cores, half an hour; any accelerator, minutes.
Expect:    docs/log.md has the PSNR on held-out sprites.
"""

import dataclasses

from ml_collections import ConfigDict

from vidgen.models.video_vae.config import VARIANTS


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = set(filter(None, arg.split(",")))
    if unknown := arguments - {"images", "demo", "tiny"}:
        raise ValueError(f"unknown argument {unknown.pop()!r}: use none, 'images', 'demo' or 'tiny'")
    config = ConfigDict()
    config.task = {"kind": "vae", "model": dataclasses.asdict(VARIANTS["nano"]), "kl_weight": 1e-3}
    config.data = {
        "kind": "sprites",
        "num_frames": 9,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "max_objects": 2,
        "cameras": ("static",),
    }
    config.data.backgrounds = ("plain",)
    config.optimizer = {"kind": "muon", "learning_rate": 2e-3, "warmup_steps": 50, "end_fraction": 0.02}
    config.run = {
        "num_steps": 1500,
        "batch_size": 6,
        "log_every": 25,
        "checkpoint_every": 100,
        "eval_every": 250,
    }
    config.mesh = {"data": -1}
    if "images" in arguments:
        config.data.update(num_frames=1, max_objects=3)
        config.optimizer.learning_rate = 4e-3
        config.run.update(num_steps=1600, batch_size=32)
    if "demo" in arguments:
        config.data.update(height=32, width=32, sizes=("large",))
        config.run.update(num_steps=400, log_every=20, eval_every=400, ema_decay=0.99)
    elif "tiny" in arguments:
        config.optimizer = {"kind": "adamw"}
        config.task.model = dataclasses.asdict(VARIANTS["tiny"])
        config.data.update(height=16, width=16, num_clips=64, num_frames=min(5, config.data.num_frames))
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    return config
