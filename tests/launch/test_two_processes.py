"""Two processes of two devices train a LoRA on packed latents under a large text encoder, with previews."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.models.tiny_tokenizer import SIZE, write_tokenizer
from vidgen.ckpt.weights import save_weights
from vidgen.core.tree import named_leaves
from vidgen.data.latents_records import LatentClip, RecordsInfo, write_latent_records
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.params import transformers_names
from vidgen.models.video_vae.config import VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.vae_folder import encoder_fingerprint, save_vae

ROOT = pathlib.Path(__file__).parents[2]
WIDTH = 16
VAE = dataclasses.replace(VARIANTS["tiny"], dim_mult=(1, 2), temporal_downsample=(True,), patch_size=4)
"""As many pixels per latent as the tiny one, in one level less, which takes less time to compile."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`vidgen train` without a workdir, on random latents, with a VAE and an encoder of random weights."""
    root = tmp_path_factory.mktemp("parts")
    vae = random_module(lambda: VideoVAE(VAE, rngs=nnx.Rngs(0)))
    save_vae(vae, root)
    config = vae.config
    info = RecordsInfo(
        vae=str(root),
        encoder=encoder_fingerprint(vae),
        channels=config.latent_channels,
        spatial_factor=config.spatial_factor,
        temporal_factor=config.temporal_factor,
        fps=8.0,
    )
    write_latent_records(root / "latents", map(latent_clip, range(32)), info)
    write_encoder(root)
    return [
        "train",
        f"--config={ROOT / 'experiments' / 'dit' / 'sprites.py'}:packed,tiny",
        f"--config.data.path={root / 'latents'}",
        f"--config.task.vae={root}",
        f"--config.task.text_encoder={ {'path': str(root), 'dtype': 'float32', 'max_tokens': 80} }",
        f"--config.task.dit.text_dim={WIDTH}",
        "--config.task.lora={'rank': 2}",
        "--config.task.sampling={'grid': {'num_steps': 2}, 'guidance': {'kind': 'apg'}}",
        "--config.mesh={'data': 1, 'fsdp': 4}",
        "--config.run.num_steps=1",
        "--config.run.eval_every=1",
    ]


def latent_clip(index):
    frames, height, width = ((1, 16, 32), (5, 32, 16))[index % 2]
    latents = np.random.default_rng(index).normal(size=VAE.latent_shape(frames, height, width))
    return LatentClip(
        latents=latents.astype(np.float32),
        caption=f"circle {index % 4}",
        name=f"clip-{index}",
        num_frames=frames,
        height=height,
        width=width,
    )


def write_encoder(folder):
    values = {"model_type": "umt5", "vocab_size": SIZE, "d_model": WIDTH, "num_layers": 1, "num_heads": 2}
    values |= {"d_kv": 8, "d_ff": 16, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
    config = T5Config(
        vocab_size=SIZE, dim=WIDTH, num_layers=1, num_heads=2, head_dim=8, ffn_dim=16, shared_bias=False
    )
    params = nnx.state(random_module(lambda: T5Encoder(config, rngs=nnx.Rngs(1))), nnx.Param, graph=False)
    names = transformers_names(named_leaves(params))
    (folder / "text_encoder").mkdir()
    save_weights(
        folder / "text_encoder" / "model.safetensors", params, names=names, metadata={"format": "pt"}
    )
    (folder / "text_encoder" / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder / "tokenizer")


def train(command, workdir, processes):
    """Of four devices in all; the loss and the pixels of the preview."""
    program = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}"]
    program += [f"--devices-per-process={4 // processes}", "--", *command, f"--workdir={workdir}"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    (preview,) = (workdir / "samples").glob("*.mp4")
    with av.open(str(preview)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(line["loss"] for line in lines if "loss" in line), frames


@pytest.fixture(scope="module")
def two(command, tmp_path_factory):
    return train(command, tmp_path_factory.mktemp("two"), 2)


def test_two_processes_train_and_preview(two):
    loss, frames = two
    assert np.isfinite(loss) and frames.shape == (5, 48, 48, 3) and frames.std() > 1


@pytest.mark.slow
def test_one_process_makes_the_same(two, command, tmp_path):
    loss, frames = train(command, tmp_path, 1)
    np.testing.assert_allclose(two[0], loss, rtol=1e-5)
    assert np.abs(frames.astype(int) - two[1]).max() <= 8, "beyond rounding before the codec"
