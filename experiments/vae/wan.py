"""Video VAE with Wan 2.1's architecture, 127 million parameters, for experiments/dit/t2v_1b.py.

Check:     vidgen preflight --config=experiments/vae/wan.py --topology=v5e:4x4
Run:       vidgen train --config=experiments/vae/wan.py --config.data.path=DIR --workdir=runs/vae_wan
Arguments: (none) the full run; `tiny` a few steps, for tests.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vidgen.models.video_vae.config import VARIANTS


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    config = ConfigDict()
    config.task = {"kind": "vae", "model": dataclasses.asdict(VARIANTS["wan2.1"]), "kl_weight": 1e-6}
    # The latent statistics of the published weights do not apply to new weights.
    config.task.model.update(latents_mean=(), latents_std=(), dtype="bfloat16", remat="full")
    config.data = {"kind": "folder", "split": "train", "crop": "random", "num_frames": 17, "fps": 16.0}
    config.data.update(height=128, width=128, stride=1.0, path=placeholder(str))
    config.optimizer = {"kind": "adamw", "learning_rate": 1e-4, "warmup_steps": 1000}
    config.run = {"num_steps": 100_000, "batch_size": 32, "eval_every": 5000, "num_threads": 16}
    config.mesh = {"data": 1, "fsdp": -1}
    if arg == "tiny":
        config.task.model = dataclasses.asdict(VARIANTS["tiny"])
        config.task.model.update(dtype="bfloat16", remat="full")
        config.data.update(height=16, width=16, num_frames=5, fps=8.0)
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    elif arg:
        raise ValueError(f"unknown argument {arg!r}: use none or 'tiny'")
    return config
