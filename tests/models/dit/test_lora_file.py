"""LoRA files: what diffusers (through PEFT) makes of ours, and we of theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.random_weights import random_module
from vidgen.ckpt.weights import WeightsError
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.diffusers_folder import save_diffusers
from vidgen.models.dit.lora_file import load_lora, save_lora
from vidgen.models.dit.model import DiT
from vidgen.nn.lora import LoRAOptions, adapted, add_low_rank, merge_low_rank
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings

CONFIG = DiTConfig(
    in_channels=4, model_dim=24, num_layers=2, num_heads=2, ffn_dim=20, text_dim=10, freq_dim=16
)
OPTIONS = LoRAOptions(rank=3, alpha=6.0, targets=r"blocks\..*|condition_embedder\.time_proj")


def make():
    return random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))


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
    return np.asarray(jax.jit(lambda dit, inputs: dit(**inputs))(dit, inputs))


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
        ({"transformer.blocks.0.norm2.diff": np.ones(24, np.float32)}, r"norm2\.diff: unknown"),
    ):
        save_file({**good, **change}, tmp_path / "b.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_lora(make(), tmp_path / "b.safetensors")
    del good[name]
    save_file(good, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn1\.to_q \(one factor of two\): unknown"):
        load_lora(make(), tmp_path / "b.safetensors")
