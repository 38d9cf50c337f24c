"""The same weights in diffusers' AutoencoderKLWan give the same latents and videos."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.ckpt.weights import WeightsError
from vidgen.core.tree import named_leaves
from vidgen.models.video_vae import diffusers_folder
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.diffusers_folder import load_diffusers, save_diffusers
from vidgen.models.video_vae.model import VideoVAE, first_statistics
from vidgen.models.video_vae.params import diffusers_names, wan_names
from vidgen.nn.variables import Buffer

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
AutoencoderKLWan = pytest.importorskip("diffusers", reason="needs the extra `parity`").AutoencoderKLWan

SHAPES = {
    "2.1": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4]},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 6,
        "dim_mult": [1, 2, 4, 4],
        "patch_size": 2,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
WAN_2_2 = {
    "encoder.conv_in.weight": "encoder.conv1.weight",
    "encoder.down_blocks.0.resnets.1.norm2.gamma": "encoder.downsamples.0.downsamples.1.residual.3.gamma",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": "encoder.downsamples.1.downsamples.0.shortcut.bias",
    "encoder.down_blocks.3.resnets.1.conv1.weight": "encoder.downsamples.3.downsamples.1.residual.2.weight",
    "encoder.down_blocks.2.downsampler.time_conv.bias": "encoder.downsamples.2.downsamples.2.time_conv.bias",
    "encoder.mid_block.attentions.0.to_qkv.weight": "encoder.middle.1.to_qkv.weight",
    "encoder.conv_out.weight": "encoder.head.2.weight",
    "quant_conv.weight": "conv1.weight",
    "post_quant_conv.weight": "conv2.weight",
    "decoder.mid_block.resnets.1.conv2.bias": "decoder.middle.2.residual.6.bias",
    "decoder.mid_block.attentions.0.proj.weight": "decoder.middle.1.proj.weight",
    "decoder.up_blocks.1.resnets.2.norm2.gamma": "decoder.upsamples.1.upsamples.2.residual.3.gamma",
    "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": "decoder.upsamples.2.upsamples.0.shortcut.weight",
    "decoder.up_blocks.0.upsampler.resample.1.weight": "decoder.upsamples.0.upsamples.3.resample.1.weight",
    "decoder.up_blocks.0.upsampler.time_conv.bias": "decoder.upsamples.0.upsamples.3.time_conv.bias",
    "decoder.norm_out.gamma": "decoder.head.0.gamma",
}
"""Names in diffusers and in Wan's own checkpoint, one or more of each kind."""
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = jit(lambda vae, video: vae.posterior(video))
decode = jit(lambda vae, raw: vae.decode_raw(raw))


def written(shape, folder):
    """A randomly initialised reference, saved in `folder`; all its parameters matter."""
    torch.manual_seed(0)
    statistics = {
        "latents_mean": [0.1 * i for i in range(shape["z_dim"])],
        "latents_std": [2.0] * shape["z_dim"],
    }
    reference = AutoencoderKLWan(num_res_blocks=2, **statistics, **shape).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
        reference.decoder.conv_out.weight.mul_(0.1)  # diffusers clips what it decodes to [-1, 1]
    reference.save_pretrained(folder)
    return reference


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    reference = written(request.param, folder)
    return reference, load_diffusers(folder), folder


def to_torch(x):
    return torch.from_numpy(np.array(x).transpose(0, 4, 1, 2, 3))


def to_numpy(x):
    return x.numpy().transpose(0, 2, 3, 4, 1)


def difference(found, expected):
    """Largest error, for outputs of unit standard deviation."""
    assert found.shape == expected.shape
    return np.abs(np.asarray(found) - expected).max() / expected.std()


@pytest.mark.parametrize("frames", [slow(1), slow(5), slow(17), 21])
def test_encode_and_decode(pair, frames):
    reference, vae, _ = pair
    side = vae.config.spatial_factor
    rng = np.random.default_rng(frames)
    video = rng.uniform(-1, 1, (1, frames, 2 * side, 3 * side, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(to_torch(video)).latent_dist
    found = encode(vae, video)
    assert difference(found.mean, to_numpy(posterior.mean)) < 1e-4
    assert difference(found.log_variance, to_numpy(posterior.logvar)) < 1e-4
    latents = rng.normal(size=found.mean.shape).astype(np.float32)
    with torch.no_grad():
        expected = reference.decode(to_torch(latents)).sample
    assert expected.abs().max() < 1.0
    assert difference(decode(vae, latents), to_numpy(expected)) < 1e-4


def test_latents_are_normalised_by_the_statistics_of_the_config(pair):
    _, vae, _ = pair
    raw = jnp.ones((1, 1, 2, 2, vae.config.latent_channels))
    mean = np.asarray(vae.config.latents_mean)
    np.testing.assert_allclose(vae.normalise(raw)[0, 0, 0, 0], (1.0 - mean) / 2.0, rtol=1e-6)


def test_what_is_exported_loads_in_diffusers_and_is_the_same(pair, tmp_path):
    reference, vae, folder = pair
    save_diffusers(vae, tmp_path)
    loaded, info = AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, expected in reference.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), expected.numpy(), err_msg=name)
    original, exported = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    for name, value in exported.items():
        if name == "latents_std":
            np.testing.assert_allclose(value, original[name], rtol=1e-6)
        else:
            assert value == pytest.approx(original[name]), name


def test_original_names_are_what_diffusers_converts(tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    reference = written(SHAPES["2.1"], tmp_path)
    params = nnx.state(load_diffusers(tmp_path), nnx.Param, graph=False)
    leaves = named_leaves(params)
    ours = {
        name: f.external_name for name, f in diffusers_names(load_diffusers(tmp_path).config, leaves).items()
    }
    original = wan_names(load_diffusers(tmp_path).config, leaves)
    converted = convert_wan_vae_to_diffusers({f.external_name: name for name, f in original.items()})
    assert {theirs: name for name, theirs in ours.items()} == converted
    assert len(converted) == len(reference.state_dict())


def test_original_names_of_wan_2_2(tmp_path):
    reference = written(SHAPES["2.2"], tmp_path)
    vae = load_diffusers(tmp_path)
    leaves = named_leaves(nnx.state(vae, nnx.Param, graph=False))
    original = wan_names(vae.config, leaves)
    table = {
        f.external_name: original[name].external_name
        for name, f in diffusers_names(vae.config, leaves).items()
    }
    assert table.keys() == reference.state_dict().keys()
    # As wan/modules/vae2_2.py of https://github.com/Wan-Video/Wan2.2 nests its modules.
    assert {theirs: table[theirs] for theirs in WAN_2_2} == WAN_2_2
    levels = {name.split(".residual")[0] for name in table.values() if ".residual." in name}
    encoder = [f"encoder.downsamples.{i}.downsamples.{j}" for i in range(4) for j in range(2)]
    decoder = [f"decoder.upsamples.{i}.upsamples.{j}" for i in range(4) for j in range(3)]
    middle = [f"{coder}.middle.{i}" for coder in ("encoder", "decoder") for i in (0, 2)]
    assert levels == {*encoder, *decoder, *middle}


def test_tensors_that_do_not_fit_are_all_named(pair, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, _, folder = pair
    path = "diffusion_pytorch_model.safetensors"
    tensors = load_file(folder / path)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"][:-1]
    del tensors["encoder.norm_out.gamma"]
    tensors["more"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(
        WeightsError, match=r"(?s)3 tensors.*norm_out\.gamma: missing.*more: only.*conv_in\.bias: \("
    ):
        load_diffusers(tmp_path)


def test_folders_of_other_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="'AutoencoderKL'; expected 'AutoencoderKLWan'"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("dim_mult", [(1, 2, 4, 4), (1, 2, 4), (1, 1, 3, 3), (4, 2, 1), (8, 1, 1)])
def test_what_diffusers_refuses_is_written_with_a_warning(dim_mult, tmp_path, monkeypatch, caplog):
    config = VAEConfig(
        base_dim=2,
        latent_channels=2,
        dim_mult=dim_mult,
        num_res_blocks=1,
        temporal_downsample=(True,) * (len(dim_mult) - 1),
        level_shortcuts=True,
    )
    monkeypatch.setattr(diffusers_folder, "save_weights", lambda *_, **__: None)
    vae = nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    vae.latents_mean, vae.latents_variance, _ = map(Buffer, first_statistics(config))
    save_diffusers(vae, tmp_path)
    try:
        AutoencoderKLWan.from_config(json.loads((tmp_path / "config.json").read_text()))
    except ValueError:
        assert "diffusers refuses this autoencoder" in caplog.text and str(dim_mult) in caplog.text
    else:
        assert not caplog.text
