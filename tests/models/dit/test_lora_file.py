"""LoRA files: what diffusers (through PEFT) makes of ours, and we of theirs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.dit import call
from tests.models.random_weights import random_module
from vidgen.ckpt.weights import WeightsError
from vidgen.core.errors import UserError
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.diffusers_folder import save_diffusers
from vidgen.models.dit.lora_file import load_lora, save_lora
from vidgen.models.dit.model import DiT
from vidgen.models.dit.wan_file import save_wan
from vidgen.nn.lora import LoRAOptions, adapted, add_low_rank, merge_low_rank
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings

CONFIG = DiTConfig(
    in_channels=4, model_dim=24, num_layers=2, num_heads=2, ffn_dim=20, text_dim=10, freq_dim=16
)
OPTIONS = LoRAOptions(rank=3, alpha=6.0, targets=r"blocks\..*|condition_embedder\.time_proj")


@functools.cache
def split():
    """A transformer, made once."""
    return nnx.split(random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0))), graph=False)


def make():
    graphdef, state = split()
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # with variables of its own


@pytest.fixture
def dit():
    """A transformer with updates that are not zero."""
    dit = make()
    add_low_rank(dit, OPTIONS, rngs=nnx.Rngs(1))
    for index, linear in enumerate(adapted(dit).values()):
        up = linear.low_rank.up
        up.set_value(0.3 * jax.random.normal(jax.random.key(index), up.shape))
    return dit


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"latents": (1, 1, 4, 4, 4), "timestep": (1,), "text": (1, 5, 10)}
    return {name: jnp.asarray(rng.uniform(size=shape), jnp.float32) for name, shape in shapes.items()}


def velocity(dit, inputs):
    return np.asarray(jax.jit(lambda dit, inputs: call.velocity(dit, **inputs))(dit, inputs))


@pytest.mark.parametrize("spelling", ["peft", "comfyui"])
def test_round_trip(dit, inputs, tmp_path, spelling):
    save_lora(dit, tmp_path / "a.safetensors", spelling)
    loaded = make()
    load_lora(loaded, tmp_path / "a.safetensors")
    assert adapted(loaded).keys() == adapted(dit).keys()
    expected = velocity(dit, inputs)
    assert np.abs(expected - velocity(make(), inputs)).max() > 0.1 * expected.std()
    np.testing.assert_allclose(velocity(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    merge_low_rank(loaded)
    np.testing.assert_allclose(velocity(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
    halved = make()
    load_lora(halved, tmp_path / "a.safetensors", scale=0.5)
    assert np.abs(velocity(halved, inputs) - expected).max() > 0.01 * expected.std()


@pytest.mark.parametrize("spelling", ["peft", "comfyui"])
def test_diffusers_makes_the_same_of_the_file(dit, inputs, tmp_path, spelling):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
    pytest.importorskip("peft", reason="needs the extra `parity`")
    save_diffusers(make(), tmp_path / "transformer")
    save_lora(dit, tmp_path / "a.safetensors", spelling)
    reference = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=reference
    )
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(np.array(inputs["latents"].transpose(0, 4, 1, 2, 3))),
            torch.from_numpy(1000.0 * np.array(inputs["timestep"])),
            torch.from_numpy(np.array(inputs["text"])),
        ).sample.permute(0, 2, 3, 4, 1)
    found = velocity(dit, inputs)
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * max(1.0, found.std())


def test_kohyas_names_ranks_by_layer_and_layers_left_out(dit, inputs, tmp_path):
    save_lora(dit, tmp_path / "a.safetensors", "comfyui")
    tensors = load_file(tmp_path / "a.safetensors")
    underscored = {}
    for name, tensor in tensors.items():
        base, _, last = name.removeprefix("diffusion_model.").partition(".lora_")
        base = "lora_unet_" + base.replace(".", "_")
        underscored[f"{base}.lora_{last}"] = tensor / 2.0 if last == "up.weight" else tensor
        underscored[f"{base}.alpha"] = np.array(6.0, np.float32)  # Twice the rank.
    cut = "lora_unet_blocks_1_ffn_0"
    rank = 2
    underscored[f"{cut}.lora_down.weight"] = underscored[f"{cut}.lora_down.weight"][:rank].copy()
    underscored[f"{cut}.lora_up.weight"] = underscored[f"{cut}.lora_up.weight"][:, :rank].copy()
    underscored[f"{cut}.alpha"] = np.array(2.0 * rank, np.float32)
    for side in ("lora_down.weight", "lora_up.weight", "alpha"):
        del underscored[f"lora_unet_blocks_0_cross_attn_k.{side}"]
    underscored["diffusion_model.blocks.0.norm3.diff"] = np.zeros(24, np.float32)
    save_file(underscored, tmp_path / "b.safetensors")
    loaded = make()
    load_lora(loaded, tmp_path / "b.safetensors")
    up = dit.blocks.ffn.up.low_rank.up
    up.set_value(up[...].at[1, rank:].set(0.0))
    key = dit.blocks.cross_attention.key.low_rank.up
    key.set_value(key[...].at[0].set(0.0))
    np.testing.assert_allclose(velocity(loaded, inputs), velocity(dit, inputs), rtol=1e-5, atol=1e-5)


def test_updates_are_merged_over_a_mesh(dit, inputs, tmp_path):
    save_lora(dit, tmp_path / "a.safetensors")
    mesh = MeshOptions(fsdp=2, tensor=4, data=1).build()
    loaded = jax.device_put(make(), shardings(make(), mesh))
    load_lora(loaded, tmp_path / "a.safetensors")
    merge_low_rank(loaded)
    with jax.set_mesh(mesh):
        found = velocity(loaded, inputs)
    np.testing.assert_allclose(found, velocity(dit, inputs), rtol=1e-4, atol=1e-5)


def test_files_that_hold_something_else(dit, tmp_path):
    with pytest.raises(ValueError, match=r"no update of low rank: train one with task\.lora"):
        save_lora(make(), tmp_path / "a.safetensors")
    save_lora(dit, tmp_path / "a.safetensors")
    good = load_file(tmp_path / "a.safetensors")
    name = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    for change, message in (
        (
            {"transformer.blocks.7.attn1.to_q.lora_A.weight": good[name]},
            r"blocks\.7.*lora_A\.weight: unknown",
        ),
        ({name: good[name][:, :5].copy()}, r"\(3, 5\) and \(24, 3\) do not fit a map of \(24, 24\)"),
        ({"transformer.blocks.0.norm9.diff": np.ones(24, np.float32)}, r"norm9\.diff: unknown"),
        ({"transformer.blocks.0.norm2.diff": np.ones(23, np.float32)}, r"\(23,\) does not fit \(24,\)"),
        ({"transformer.blocks.0.attn1.norm_q.diff_b": np.ones(24)}, "there is no such bias"),
        ({"transformer.blocks.0.norm2.diff": np.full(24, np.nan)}, "not finite"),
        ({"transformer.blocks.0.norm2.diff": np.full(24, 2e12)}, r"a number from -1,000,000,000,000 to"),
        ({"transformer.blocks.0.norm2.diff": np.ones(24, np.int32)}, "of type int32, expected floating"),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": good[name]},
            r"blocks\.0\.\S+: means the same as \S+blocks\.0\.",
        ),
        ({"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": np.ones(24)}, "DoRA is not supported"),
        ({"transformer.blocks.0.attn1.to_q.hada_w1_a": np.ones(24)}, "LoHa is not supported"),
        ({name: np.ones((0, 24), np.float32)}, r"\(0, 24\) and \(24, 3\) do not fit"),
    ):
        save_file({**good, **change}, tmp_path / "b.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_lora(make(), tmp_path / "b.safetensors")
    del good[name]
    save_file(good, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn1\.to_q \(one factor of two\): unknown"):
        load_lora(make(), tmp_path / "b.safetensors")


def lightning(rng, rank=2):
    """A distilled model's file: low rank, whole arrays and biases, with Wan's names."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "blocks.0.self_attn.q.lora_down.weight": draw(rank, 24),
        "blocks.0.self_attn.q.lora_up.weight": draw(24, rank),
        "blocks.0.self_attn.q.alpha": np.array(1.0, np.float32),
        "blocks.0.self_attn.q.diff_b": draw(24),
        "blocks.1.self_attn.k.diff": draw(24, 24),
        "blocks.1.norm3.diff": draw(24),
        "blocks.1.norm3.diff_b": draw(24),
        "blocks.1.modulation.diff": draw(1, 6, 24),
        "blocks.0.self_attn.norm_q.diff": draw(24),
        "head.head.diff": draw(16, 24),
        "patch_embedding.lora_down.weight": draw(rank, 4, 1, 2, 2),
        "patch_embedding.lora_up.weight": draw(24, rank, 1, 1, 1),
        "patch_embedding.diff_b": draw(24),
        "time_projection.1.diff_b": draw(144),
    }


@pytest.mark.parametrize("mesh", [None, MeshOptions(fsdp=2, tensor=4, data=1)])
def test_whole_changes_of_weights_and_biases_are_added(tmp_path, mesh):
    """W + diff, b + diff_b, in the layout of Wan's own file."""
    tensors = lightning(np.random.default_rng(0))
    save_file({f"diffusion_model.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    save_wan(make(), tmp_path / "before.safetensors")
    dit = make()
    if mesh is not None:
        dit = jax.device_put(dit, shardings(dit, mesh.build()))
    placed = {name: leaf.sharding for name, leaf in named_leaves(dit).items()}
    load_lora(dit, tmp_path / "a.safetensors", scale=0.5)
    merge_low_rank(dit)
    assert {name: leaf.sharding for name, leaf in named_leaves(dit).items()} == placed
    save_wan(dit, tmp_path / "after.safetensors")
    expected = load_file(tmp_path / "before.safetensors")
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "diff":
            expected[base if base.endswith("modulation") else f"{base}.weight"] += 0.5 * tensor
        elif kind == "diff_b":
            expected[f"{base}.bias"] += 0.5 * tensor
    for base, alpha in (("blocks.0.self_attn.q", 1.0), ("patch_embedding", 2.0)):
        down, up = (tensors[f"{base}.lora_{side}.weight"] for side in ("down", "up"))
        delta = up.reshape(24, 2) @ down.reshape(2, -1)
        expected[f"{base}.weight"] += 0.5 * alpha / 2 * delta.reshape(expected[f"{base}.weight"].shape)
    found = load_file(tmp_path / "after.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def one_map(rank=4):
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, 24), (24, rank)))
    return {"lora_A": down, "lora_B": up}, (up @ down).T


def adapter(**values):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 16, **values}


def header(**values):
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in adapter(**values).items()})
    }


BASE = "blocks.1.attn1.to_q"
SCALES = {
    "nothing is said": ({}, None, "transformer.{}.lora_A.weight", 1.0),
    "the header": (header(), None, "transformer.{}.lora_A.weight", 4.0),
    "the header, rslora": (header(use_rslora=True), None, "transformer.{}.lora_A.weight", 8.0),
    "patterns": (
        header(
            r=9, rank_pattern={"attn1.to_q": 4}, alpha_pattern={"k": 1, f"^{BASE}$".replace(".", "\\."): 2}
        ),
        None,
        "transformer.{}.lora_A.weight",
        0.5,
    ),
    "another part's": (
        {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 16})},
        None,
        "transformer.{}.lora_A.weight",
        1.0,
    ),
    "the config beside": ({}, adapter(lora_alpha=8.0), "base_model.model.{}.lora_A.weight", 2.0),
    "the header before the config": (header(), adapter(lora_alpha=8.0), "transformer.{}.lora_A.weight", 4.0),
    "kohya's header": ({"ss_network_alpha": "2.0"}, None, "diffusion_model.{}.lora_down.weight", 0.5),
    # Converters to PEFT's names multiply it in.
    "kohya's header, PEFT's names": (
        {"ss_network_alpha": "2"},
        None,
        "diffusion_model.{}.lora_A.weight",
        1.0,
    ),
}


@pytest.mark.parametrize("kind", SCALES)
def test_alpha_is_read_from_every_place(kind, tmp_path, caplog):
    metadata, config, name, scale = SCALES[kind]
    factors, delta = one_map()
    tensors = {
        name.format(BASE): factors["lora_A"],
        name.format(BASE).replace("lora_A", "lora_B").replace("lora_down", "lora_up"): factors["lora_B"],
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    dit, before = make(), make().blocks.self_attention.query.kernel[...]
    with caplog.at_level("WARNING"):
        load_lora(dit, tmp_path if config else path)
    merge_low_rank(dit)
    change = dit.blocks.self_attention.query.kernel[...] - before
    np.testing.assert_allclose(change, np.stack([np.zeros((24, 24)), scale * delta]), atol=1e-5)
    said = "adapter_model.safetensors: alpha is neither in the tensors" in caplog.text
    assert said == (scale == 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "16"}, r"lora_alpha: found '16', expected a number from 0 to"),
        ({"lora_alpha": -1}, "lora_alpha: found -1"),
        ({"r": 0}, "r: found 0"),
        ({"r": 8}, r"says rank 8 of blocks\.1\.attn1\.to_q, whose tensors have rank 4"),
        ({"use_dora": True}, "DoRA is not supported"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "is a regular expression; expected a name"),
        ({"rank_pattern": [3]}, "rank_pattern is .* expected a mapping"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_said_of_alpha_and_cannot_be(change, message, beside, tmp_path):
    factors, _ = one_map()
    tensors = {f"transformer.{BASE}.{side}.weight": tensor for side, tensor in factors.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata=None if beside else header(**change))
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter(**change)))
    where = r"adapter_config\.json" if beside else r"a\.safetensors: lora_adapter_metadata"
    with pytest.raises(UserError, match=rf"{where}.*{message}"):
        load_lora(make(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("alpha", [np.nan, -1.0, np.inf])
def test_alpha_tensors_that_are_none(alpha, tmp_path):
    factors, _ = one_map()
    tensors = {f"{BASE}.{side}.weight": tensor for side, tensor in factors.items()}
    save_file({**tensors, f"{BASE}.alpha": np.array(alpha, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors(.|\n)*alpha"):
        load_lora(make(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the scale of a LoRA: found"):
        load_lora(make(), tmp_path / "a.safetensors", scale=alpha * 1e6)


def test_the_bias_of_a_factor_is_added_to_the_bias(tmp_path):
    factors, _ = one_map()
    tensors = {f"{BASE}.{side}.weight": tensor for side, tensor in factors.items()}
    tensors |= {f"{BASE}.lora_B.bias": np.ones(24, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header())
    dit = make()
    load_lora(dit, tmp_path / "a.safetensors", scale=0.5)
    change = dit.blocks.self_attention.query.bias[...] - make().blocks.self_attention.query.bias[...]
    np.testing.assert_allclose(change, np.stack([np.zeros(24), np.full(24, 0.5 * 4.0)]), atol=1e-6)
