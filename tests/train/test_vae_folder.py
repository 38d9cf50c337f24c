import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.ckpt import weights
from vidgen.ckpt.tensor_files import WeightsError
from vidgen.core.config import ConfigError
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import export_vae, has_vae, load_vae, save_vae

CONFIG = VAEConfig(
    base_dim=4, latent_channels=3, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)


def vae(seed=0):
    return random_module(lambda: VideoVAE(CONFIG, rngs=nnx.Rngs(0)), seed)


def assert_same(a, b):
    assert named_leaves(a).keys() == named_leaves(b).keys()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a, graph=False), nnx.state(b, graph=False))


def task(workdir):
    return TextToVideoTask(
        vae=str(workdir), dit=DiTConfig(in_channels=3, text_dim=8), text=ByteEncoderConfig(dim=8)
    )


def test_what_is_saved_is_loaded_weights_statistics_and_config(tmp_path):
    assert not has_vae(tmp_path)
    saved = vae()
    save_vae(saved, tmp_path)
    assert has_vae(tmp_path)
    loaded = load_vae(tmp_path)
    assert loaded.config == CONFIG
    assert_same(loaded, saved)
    assert "latents_mean" in named_leaves(loaded) and np.abs(loaded.latents_mean[...]).min() > 0
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", "model.safetensors"]


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    save_vae(vae(), tmp_path)
    path = tmp_path / "vae" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    with pytest.raises(WeightsError, match=r"model.safetensors is damaged: 1 of \d+ arrays are not what was"):
        load_vae(tmp_path)


def test_weights_of_before_digests_load_with_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    saved = vae()
    save_vae(saved, tmp_path)
    weights.save_weights(tmp_path / "vae" / "model.safetensors", nnx.state(saved, graph=False))
    assert_same(load_vae(tmp_path), saved)
    assert "is from before weights had digests" in caplog.text


def test_saving_again_replaces(tmp_path):
    save_vae(vae(0), tmp_path)
    export_vae(vae(1), tmp_path, step=3)
    assert_same(load_vae(tmp_path), vae(1))


def test_an_export_that_is_whole_is_not_repeated_and_one_that_is_not_is(tmp_path):
    export_vae(vae(0), tmp_path, step=3)
    export_vae(vae(1), tmp_path, step=3)
    assert_same(load_vae(tmp_path), vae(0))
    (tmp_path / "vae" / "config.json").unlink()
    export_vae(vae(1), tmp_path, step=3)
    assert_same(load_vae(tmp_path), vae(1))
    export_vae(vae(2), tmp_path, step=4)
    assert_same(load_vae(tmp_path), vae(2))


def test_a_loaded_vae_computes_the_same(tmp_path):
    saved = vae()
    save_vae(saved, tmp_path)
    video = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 4, 3)), jnp.float32)
    encode = jax.jit(lambda vae, video: vae.encode(video))
    np.testing.assert_array_equal(encode(load_vae(tmp_path), video), encode(saved, video))


def test_a_folder_without_a_vae_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vae holds no VAE; .* correct task\.vae"):
        load_vae(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no VAE"):
        task(tmp_path / "nowhere").prepare(tmp_path / "run")
    assert not has_vae(tmp_path / "run")


def test_weights_come_before_the_config_that_says_they_are_there(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("vidgen.train.vae_folder.save_checked_weights", fails)
    with pytest.raises(OSError, match="disk full"):
        save_vae(vae(), tmp_path)
    assert not has_vae(tmp_path)


def test_config_and_weights_that_do_not_belong_together(tmp_path):
    save_vae(vae(), tmp_path)
    path = tmp_path / "vae" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"latent_channels": 4}))
    with pytest.raises(weights.WeightsError, match="latents_mean"):
        load_vae(tmp_path)
    path.write_text(json.dumps(values | {"latent_chanels": 4}))
    with pytest.raises(ConfigError, match=r'config\.json.*did you mean "latent_channels"'):
        load_vae(tmp_path)


def test_a_run_takes_a_copy_once_and_keeps_it(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    save_vae(vae(0), source)
    own = task(source).prepare(run)
    assert own.vae == str(run)
    assert_same(own.frozen()["vae"].load(), vae(0))
    # The VAE's run goes on, or goes away; this run stays with what it began with.
    save_vae(vae(1), source)
    assert_same(task(source).prepare(run).frozen()["vae"].load(), vae(0))
    (source / "vae" / "config.json").unlink()
    assert_same(task(source).prepare(run).frozen()["vae"].load(), vae(0))
