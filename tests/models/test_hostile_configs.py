"""config.json of other programs' weights: what cannot be is one error that names the file and the key."""

import json
import os

import numpy as np
import pytest
from flax import nnx

from vidgen.ckpt.weights import WeightsError, save_weights
from vidgen.core.config import to_dict
from vidgen.core.errors import UserError
from vidgen.models.clip import transformers_folder as clip
from vidgen.models.dit import diffusers_folder as dit
from vidgen.models.t5 import transformers_folder as t5
from vidgen.models.video_vae import diffusers_folder as vae
from vidgen.models.video_vae.config import VAEConfig
from vidgen.train import vae_folder

DIT = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 20,
    "num_layers": 2,
    "eps": 1e-6,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 4,
    "z_dim": 2,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.1, -0.2],
    "latents_std": [1.0, 0.5],
}
T5 = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 30,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 4,
    "layer_norm_epsilon": 1e-6,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}
MODELS = {"dit": (dit, DIT), "vae": (vae, VAE), "t5": (t5, T5), "clip": (clip, CLIP)}
LAYERS = {"dit": "num_layers", "vae": "num_res_blocks", "t5": "num_layers", "clip": "num_hidden_layers"}
LOAD = {"dit": dit.load_diffusers, "vae": vae.load_diffusers, "t5": t5.load_transformers}
NAMES = {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "t5": "model"}
KEYS = [(model, key) for model, (_, values) in MODELS.items() for key in values]


def write(folder, values):
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.mark.parametrize("model", MODELS)
def test_configs_that_can_be(model, tmp_path):
    module, values = MODELS[model]
    write(tmp_path, values)
    assert module.read_config(tmp_path)


@pytest.mark.parametrize(("model", "key"), KEYS)
def test_every_key_is_checked(model, key, tmp_path):
    module, values = MODELS[model]
    numbers = isinstance(values[key], int | float)
    hostile = [{"a": 1}, [[]], "nan", "", True] if key != "temperal_downsample" else [{"a": 1}, [[]], "nan"]
    hostile += [0, -1, 10**9, 2**70, 1e300, 0.5] if numbers and not key.endswith(("eps", "epsilon")) else [-1]
    for value in hostile:
        write(tmp_path, {**values, key: value})
        with pytest.raises(UserError, match=rf"config\.json.*{key}|config\.json is of"):
            module.read_config(tmp_path)
    for missing in ({}, {key: None}):
        write(tmp_path, {k: v for k, v in values.items() if k != key} | missing)
        with pytest.raises(UserError, match=rf"config\.json(: {key} is (missing|null)| is of .*'None')"):
            module.read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"a"', "{", '{"a": NaN}', "{" * 100_000, '{"a":' * 100_000, "[" * 100_000]
)
@pytest.mark.parametrize("model", MODELS)
def test_files_that_are_no_config(model, text, tmp_path):
    write(tmp_path, text)
    with pytest.raises(UserError, match=r"config\.json: "):
        MODELS[model][0].read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{\0")
    with pytest.raises(UserError, match=r"config\.json: not UTF-8"):
        MODELS[model][0].read_config(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_pipes_and_devices_are_no_config(model, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json"):
        MODELS[model][0].read_config(tmp_path)


@pytest.mark.parametrize("model", LOAD)
def test_a_model_that_is_larger_than_its_tensors_is_not_built(model, tmp_path, monkeypatch):
    _, values = MODELS[model]
    save_weights(tmp_path / f"{NAMES[model]}.safetensors", {"a": np.zeros(5000, np.float32)})
    write(tmp_path, {**values, LAYERS[model]: 30})
    monkeypatch.setattr(nnx, "eval_shape", lambda *_: pytest.fail("the model was built"))
    match = r"config\.json describes a model of .* numbers or more, .*\.safetensors holds 5,000"
    with pytest.raises(WeightsError, match=match):
        LOAD[model](tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_res_blocks": 10**9}, r"num_res_blocks: found 1000000000"),
        ({"num_res_blocks": 30, "base_dim": 10**5}, r"describes a model of .* numbers or more"),
        ({"dim_mult": [1] * 100, "temporal_downsample": [False] * 99}, "dim_mult has 100 levels"),
        ({"base_dim": "4"}, "base_dim: found '4'"),
        ({"latents_std": [0.0, 1.0]}, r"latents_std\[0\]: found 0\.0"),
        ({"shape": 3}, 'unknown key "shape"'),
    ],
)
def test_the_config_of_a_vae_trained_here(change, message, tmp_path):
    config = VAEConfig(
        base_dim=4, latent_channels=2, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)
    )
    save_weights(tmp_path / "vae" / "model.safetensors", {"a": np.zeros(5000, np.float32)})
    write(tmp_path / "vae", {**to_dict(config), **change})
    with pytest.raises(UserError, match=rf"vae/config\.json.*{message}"):
        vae_folder.load_vae(tmp_path)
