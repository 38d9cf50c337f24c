"""Text to video on the sprite world: a patch transformer over the latents of experiments/vae/sprites.py.

Run:       vidgen train --config=experiments/dit/sprites.py --workdir=runs/dit --config.task.vae=runs/vae
Arguments: (none) the full run; `demo` 32 x 32, minutes on two CPU cores; `tiny` a few steps, for tests.
Hardware:  two CPU cores, two hours; any accelerator, minutes.
Expect:    docs/log.md has the prompt alignment on held-out combinations of colour and shape.
"""

import dataclasses

from ml_collections import ConfigDict

from vidgen.models.dit.config import VARIANTS
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    config = ConfigDict()
    config.task = {
        "kind": "text_to_video",
        "vae": "runs/vae",
        "dit": _dit("nano", vae="nano"),
        "text": {"dim": 128, "num_layers": 3, "num_heads": 4, "ffn_dim": 256, "max_bytes": 96},
        "caption_dropout": 0.1,
        "density": {"kind": "logit_normal"},
        "draws_per_clip": 2,
    }
    config.data = {
        "kind": "sprites",
        "num_frames": 9,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "max_objects": 1,
        "cameras": ("static",),
    }
    config.data.backgrounds = ("plain",)
    config.data.motions = ("left", "right", "up", "down", "still")
    config.optimizer = {
        "kind": "muon",
        "learning_rate": 1e-2,
        "adam_learning_rate": 3e-3,
        "warmup_steps": 100,
        "end_fraction": 0.05,
    }
    config.run = {
        "num_steps": 4000,
        "batch_size": 16,
        "log_every": 25,
        "checkpoint_every": 200,
        "eval_every": 400,
    }
    config.mesh = {"data": -1}
    if arg == "demo":
        config.task.dit = _dit("tiny", vae="nano")
        config.task.dit.num_layers = 4
        config.task.text = {"dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 128, "max_bytes": 96}
        config.data.update(height=32, width=32, sizes=("large",), motions=("left", "right"))
        config.optimizer.update(learning_rate=2e-2, adam_learning_rate=1e-2)
        config.run.update(num_steps=1000, log_every=50, eval_every=1000, ema_decay=0.99)
    elif arg == "tiny":
        config.task.dit = _dit("tiny", vae="tiny")
        config.task.text = {"dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 64, "max_bytes": 96}
        config.data.update(height=16, width=16, num_frames=5, num_clips=64)
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    elif arg:
        raise ValueError(f"unknown argument {arg!r}: use none, 'demo' or 'tiny'")
    return config


def _dit(variant: str, *, vae: str) -> dict:
    dit = dataclasses.asdict(VARIANTS[variant])
    dit["in_channels"] = VAE_VARIANTS[vae].latent_channels
    dit["text_dim"] = 128 if variant == "nano" else 64
    return dit
