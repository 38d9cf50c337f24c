"""Fine-tunes Wan's open weights on your folder of videos: all weights, or LoRA.

Weights:   vidgen import Wan2.1-T2V-1.3B-Diffusers --to models/wan
Run:       vidgen train --config=experiments/dit/wan.py:lora --config.data.path=DIR --workdir=runs/wan_lora
           If the weights are not in models/wan, add --config.task.vae, --config.run.init_from and
           --config.task.text_encoder.path.
Export:    vidgen export runs/wan_lora --format lora --spelling comfyui --out mine.safetensors
Arguments: (none) all weights of 2.1 T2V 1.3B; `lora` LoRA of rank 32; `ti2v` 2.2 TI2V-5B, from text and from
           images; `t2v-high`, `t2v-low`, `i2v-high`, `i2v-low` one expert of 2.2 A14B (its init_from is the
           folder `transformer` or `transformer_2` in models/wan). Join arguments with commas:
           `t2v-low,lora`. `tiny` a few steps without Wan's weights, for tests.
Check:     vidgen preflight --config=experiments/dit/wan.py --vae=experiments/vae/wan.py --topology=v5e:4x4
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vidgen.core.config import to_dict
from vidgen.models.dit.config import VARIANTS
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS
from vidgen.sampling.published import PUBLISHED

_EXPERTS = {
    "t2v-high": ("wan2.2-t2v-a14b", (0.875, 1.0)),
    "t2v-low": ("wan2.2-t2v-a14b", (0.0, 0.875)),
    "i2v-high": ("wan2.2-i2v-a14b", (0.9, 1.0)),
    "i2v-low": ("wan2.2-i2v-a14b", (0.0, 0.9)),
}


def _sampling(variant: str, *, low_noise: bool = False) -> dict:
    """The authors' sampling options; one expert alone samples from noise to data with its guidance scale."""
    options = to_dict(PUBLISHED[variant].options)
    second = options.pop("guidance_scale_2")
    return options | ({"guidance_scale": second} if low_noise else {})


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = set(filter(None, arg.split(",")))
    config = ConfigDict()
    config.task = {
        "kind": "text_to_video",
        "vae": "models/wan",
        "dit": dataclasses.asdict(VARIANTS["wan2.1-t2v-1.3b"]),
        "text_encoder": {"path": "models/wan", "cache": "runs/wan_captions"},
        "caption_dropout": 0.1,
        "density": {"kind": "logit_normal", "shift": 3.0},
        "sampling": _sampling("wan2.1-t2v-1.3b"),
    }
    # For 480 x 832, the size of this experiment.
    config.task.sampling.grid.shift = 3.0
    config.data = {
        "kind": "folder",
        "split": "train",
        "num_frames": 81,
        "height": 480,
        "width": 832,
        "fps": 16.0,
        "crop": "random",
    }
    config.data.path = placeholder(str)
    config.optimizer = {"kind": "adamw", "learning_rate": 1e-5, "b2": 0.95, "warmup_steps": 200}
    config.run = {"num_steps": 10_000, "batch_size": 16, "eval_every": 1000, "num_threads": 16}
    config.run.init_from = "models/wan"
    config.mesh = {"data": 1, "fsdp": -1}
    for name in sorted(arguments & _EXPERTS.keys()):
        variant, between = _EXPERTS[name]
        config.task.dit = dataclasses.asdict(VARIANTS[variant])
        config.task.density.update(shift=5.0, between=between)
        config.task.sampling = _sampling(variant, low_noise=name.endswith("low"))
        if name.startswith("i2v"):
            config.task.conditioners = [{"kind": "concat_frames"}]
    if "ti2v" in arguments:
        config.task.dit = dataclasses.asdict(VARIANTS["wan2.2-ti2v-5b"])
        config.task.density.shift = 5.0
        config.task.sampling = _sampling("wan2.2-ti2v-5b")
        config.task.conditioners = [{"kind": "first_frame", "probability": 0.5}]
        config.data.update(num_frames=121, height=704, width=1280, fps=24.0)
    config.task.dit.update(dtype="bfloat16", remat="full")
    if "lora" in arguments:
        config.task.lora = {"rank": 32}
        config.optimizer.learning_rate = 1e-4
    if "tiny" in arguments:
        _make_tiny(config)
    if unknown := arguments - {"lora", "ti2v", "tiny", *_EXPERTS}:
        raise ValueError(f"unknown argument {min(unknown)!r}: use lora, ti2v, tiny, {', '.join(_EXPERTS)}")
    return config


def _make_tiny(config: ConfigDict) -> None:
    """Replaces the models by tiny ones, the text encoder by a byte encoder, and removes `init_from`."""
    channels = VAE_VARIANTS["tiny"].latent_channels
    concatenated = config.task.dit.in_channels > (config.task.dit.out_channels or config.task.dit.in_channels)
    config.task.dit = dataclasses.asdict(VARIANTS["tiny"])
    config.task.dit.update(dtype="bfloat16", remat="full", in_channels=channels)
    if concatenated:
        factor = VAE_VARIANTS["tiny"].temporal_factor
        config.task.dit.update(in_channels=2 * channels + factor, out_channels=channels)
    config.task.text = {"dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 64, "max_bytes": 95}
    del config.task.text_encoder
    del config.run.init_from
    config.data.update(height=16, width=16, num_frames=5, fps=8.0)
    config.run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2, num_threads=2)
