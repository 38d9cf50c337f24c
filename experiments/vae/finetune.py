"""Fine-tunes a video VAE against a discriminator, for sharper frames: the whole VAE, or only its decoder.

Run:       vidgen train --config=experiments/vae/finetune.py --config.run.init_from=runs/vae
           --workdir=runs/vae_sharp
           vidgen train --config=experiments/vae/finetune.py:decoder --config.run.init_from=runs/vae
           --workdir=runs/vae_decoder
           vidgen train --config=experiments/vae/finetune.py:folder --config.data.path=DIR
           --config.run.init_from=runs/vae_folder --workdir=runs/vae_folder_sharp
           with LPIPS: --config.task.perceptual_weight=0.5 --config.task.perceptual_weights=lpips.safetensors
Arguments: (none) the VAE of sprites.py; `decoder` freezes the encoder, so that a transformer trained on its
           latents stays valid; `folder` the VAE of folder.py; `images`, `demo` and `tiny` as in those files.
Hardware:  any accelerator, minutes. On CPUs a step with the discriminator takes about ten times as long as a
           step without.
Aim:       lower wavelet and perceptual distances, at the cost of a little PSNR.
"""

import dataclasses

from ml_collections import ConfigDict

from vidgen.models.discriminator.config import VARIANTS

from . import folder, sprites


def get_config(arg: str = "") -> ConfigDict:
    """The values of `vidgen.train.experiment.Experiment`."""
    arguments = set(filter(None, arg.split(",")))
    if unknown := arguments - {"folder", "decoder", "images", "demo", "tiny"}:
        raise ValueError(
            f"unknown argument {min(unknown)!r}: use none, folder, decoder, images, demo or tiny"
        )
    source = folder if "folder" in arguments else sprites
    config = source.get_config(",".join(sorted(arguments - {"folder", "decoder"})))
    size = "tiny" if "tiny" in arguments else "small"
    config.task["train"] = "decoder" if "decoder" in arguments else "all"
    config.task["wavelet_weight"] = 0.5
    config.task["adversary"] = {
        "discriminator": dataclasses.asdict(VARIANTS[size]),
        "optimizer": {"kind": "adamw", "learning_rate": 2e-4, "b1": 0.5, "b2": 0.9, "weight_decay": 0.0},
        # The discriminator starts once the VAE has adapted to the new losses.
        "start_step": 100,
        "weight": 0.1,
        "r1_weight": 0.1,
        "lecam_weight": 0.01,
    }
    config.optimizer = {"kind": "adamw", "learning_rate": 2e-4, "warmup_steps": 50}
    if "tiny" in arguments:
        config.task["adversary"]["start_step"] = 1
    return config
