"""Text to video on the sprite world: a patch transformer over the latents of experiments/vae/sprites.py.

Run:       vidgen train --config=experiments/dit/sprites.py --workdir=runs/dit --config.task.vae=runs/vae
           vidgen data latents --config=experiments/dit/sprites.py:packed --vae=runs/vae
           --out=runs/sprites_latents --num-clips=64000
           vidgen train --config=experiments/dit/sprites.py:packed --workdir=runs/dit_packed
           --config.task.vae=runs/vae
Arguments: (none) the full run; `packed` mixed sizes and durations in packed rows, with as many tokens per
           step as the full run; `demo` 32 x 32, minutes on two CPU cores; `tiny` a few steps, for tests; also
           `packed,tiny`.
Hardware:  two CPU cores, two hours; any accelerator, minutes.
Expect:    docs/log.md has the prompt alignment on held-out combinations of colour and shape.
"""

import dataclasses

from ml_collections import ConfigDict

from vidgen.models.dit.config import VARIANTS
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS

SIZES = (
    # frames, height, width, share of the clips
    (1, 64, 64, 0.08),
    (1, 96, 96, 0.06),
    (5, 64, 64, 0.08),
    (5, 48, 80, 0.07),
    (5, 80, 48, 0.07),
    (9, 64, 64, 0.24),
    (9, 48, 64, 0.08),
    (9, 64, 48, 0.08),
    (9, 64, 96, 0.06),
    (9, 96, 64, 0.06),
    (17, 48, 48, 0.06),
    (17, 64, 64, 0.06),
)
"""Clip sizes of `packed`, 9 to 80 tokens each."""


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = set(filter(None, arg.split(",")))
    if unknown := arguments - {"packed", "demo", "tiny"}:
        raise ValueError(f"unknown argument {unknown.pop()!r}: use none, 'packed', 'demo' or 'tiny'")
    if {"packed", "demo"} <= arguments:
        raise ValueError("the arguments 'packed' and 'demo' exclude each other: use one")
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
    if "demo" in arguments:
        config.task.dit = _dit("tiny", vae="nano")
        config.task.dit.num_layers = 4
        config.task.text = {"dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 128, "max_bytes": 96}
        config.data.update(height=32, width=32, sizes=("large",), motions=("left", "right"))
        config.optimizer.update(learning_rate=2e-2, adam_learning_rate=1e-2)
        config.run.update(num_steps=1000, log_every=50, eval_every=1000, ema_decay=0.99)
    elif "tiny" in arguments:
        config.task.dit = _dit("tiny", vae="tiny")
        config.task.text = {"dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 64, "max_bytes": 96}
        config.data.update(height=16, width=16, num_frames=5, num_clips=64)
        config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    if "packed" in arguments:
        _pack(config, tiny="tiny" in arguments)
    return config


def _pack(config: ConfigDict, *, tiny: bool) -> None:
    """Replaces batches of one clip size by packed rows of clips of all sizes."""
    sizes = ((1, 16, 32, 0.5), (5, 32, 16, 0.5)) if tiny else SIZES
    names = ("num_frames", "height", "width", "weight")
    config.data.buckets = [dict(zip(names, size, strict=True)) for size in sizes]
    config.data = {
        "kind": "latents",
        "path": "runs/sprites_latents",
        "packing": {"tokens_per_row": 8 if tiny else 192, "clips_per_row": 3 if tiny else 5},
        "clips": config.data.to_dict(),
    }
    # 8 packed rows of 192 tokens. Without packing, a batch is 16 clips of 48 tokens, each drawn twice to
    # amortize the encoding of its video in every step.
    config.task.draws_per_clip = 1
    config.run.batch_size = 8


def _dit(variant: str, *, vae: str) -> dict:
    dit = dataclasses.asdict(VARIANTS[variant])
    dit["in_channels"] = VAE_VARIANTS[vae].latent_channels
    dit["text_dim"] = 128 if variant == "nano" else 64
    return dit
