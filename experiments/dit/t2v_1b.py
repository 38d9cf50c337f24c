"""Text to video with 1.3e9 parameters: Wan 2.1's small transformer over latents of its VAE, on your folder.

Check:     vidgen preflight --config=experiments/dit/t2v_1b.py --vae=experiments/vae/wan.py --topology=v5e:4x4
Run:       vidgen train --config=experiments/dit/t2v_1b.py --config.data.path=DIR --workdir=runs/t2v_1b
           --config.task.vae=runs/vae_wan
Arguments: (none) the full run; `tiny` a few steps, for tests.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vidgen.models.dit.config import VARIANTS
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    config = ConfigDict()
    config.task = {
        "kind": "text_to_video",
        "vae": "runs/vae_wan",
        "dit": dataclasses.asdict(VARIANTS["wan2.1-t2v-1.3b"]),
        "text": {"dim": 1024, "num_layers": 8, "num_heads": 16, "ffn_dim": 2816, "max_bytes": 511},
        "caption_dropout": 0.1,
        "density": {"kind": "logit_normal", "shift": 3.0},
    }
    config.task.dit.update(text_dim=1024, dtype="bfloat16", remat="full")
    config.task.text.dtype = "bfloat16"
    config.data = {
        "kind": "folder",
        "split": "train",
        "num_frames": 49,
        "height": 256,
        "width": 448,
        "fps": 16.0,
        "crop": "random",
    }
    config.data.path = placeholder(str)
    config.optimizer = {"kind": "adamw", "learning_rate": 1e-4, "b2": 0.95, "warmup_steps": 1000}
    config.run = {
        "num_steps": 200_000,
        "batch_size": 16,
        "ema_decay": 0.9999,
        "eval_every": 5000,
        "keep_every": 20_000,
        "num_threads": 16,
    }
    config.mesh = {"data": 1, "fsdp": -1}
    if arg == "tiny":
        config.task.dit = dataclasses.asdict(VARIANTS["tiny"])
        config.task.dit.update(
            dtype="bfloat16", remat="full", in_channels=VAE_VARIANTS["tiny"].latent_channels
        )
        config.task.text = {"dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 64, "max_bytes": 95}
        config.task.text.dtype = "bfloat16"
        config.data.update(height=16, width=16, num_frames=5, fps=8.0)
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    elif arg:
        raise ValueError(f"unknown argument {arg!r}: use none or 'tiny'")
    return config
