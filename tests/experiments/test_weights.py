"""The weights that come with the experiments still do what the log says."""

import pathlib

import jax
import numpy as np

from vidgen.core import pixels
from vidgen.data.sprites.source import SpritesData
from vidgen.evals.alignment import score_alignment
from vidgen.evals.quality import psnr
from vidgen.train.vae_folder import load_vae

WEIGHTS = pathlib.Path(__file__).parents[2] / "experiments" / "weights"


def test_the_sprites_vae_reconstructs_held_out_clips():
    vae = load_vae(WEIGHTS / "sprites_vae")
    source = SpritesData(
        seed=1, split="heldout", num_frames=9, max_objects=1, backgrounds=("plain",), cameras=("static",)
    ).source()
    clips = np.stack([source[index]["video"] for index in range(16)])
    run = jax.jit(lambda vae, video: pixels.to_uint8(vae.decode(vae.encode(pixels.to_float(video)))))
    made = np.asarray(run(vae, clips))
    scores = score_alignment([source.scene(index) for index in range(16)], list(made))
    assert np.mean(psnr(made, clips)) > 34.5  # 35.09 when they were added
    assert scores["colour"] == scores["direction"] == 1.0
    assert scores["shape"] >= 15 / 16
