import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.train.small_vae import ADVERSARIAL, ADVERSARY, MODEL, PLAIN
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core.tree import named_leaves
from vidgen.data.sprites.source import SpritesData
from vidgen.models.dit.config import VARIANTS as DIT_VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.video_vae.diffusers_folder import save_diffusers
from vidgen.nn.lora import LoRAOptions
from vidgen.nn.variables import Buffer, Constant
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.train.experiment import Experiment, claim_workdir
from vidgen.train.init_from import init_from_run
from vidgen.train.state import TrainState
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import load_vae, save_vae

DECODER = dataclasses.replace(PLAIN, train="decoder")
MESH = MeshOptions(data=2, fsdp=2, tensor=2)


def state(task, seed, mesh=None):
    """A state of random numbers, sharded as a run's is; with a LoRA's base, as older versions saved it."""
    module = random_module(lambda: task.build(nnx.Rngs(0)), seed)
    _, params, buffers, base = nnx.split(module, nnx.Param, Buffer, Constant, graph=False)
    buffers = nnx.merge_state(buffers, base)
    tree = {"params": params, "ema": jax.tree.map(lambda x: 2 * x, params), "buffers": buffers}
    tree = jax.device_put(tree, shardings(tree, mesh or MeshOptions().build(jax.devices()[:1])))
    return TrainState(step=jnp.zeros((), jnp.int32), opt_state=(), key=jax.random.key(0), **tree)


def saved(workdir, task, seed=0):
    source = state(task, seed)
    with CheckpointManager(workdir / "checkpoints") as checkpoints:
        checkpoints.save(3, source)
    return named_leaves(source.ema) | named_leaves(source.buffers)


def check(found, expected):
    """The parameters, their averages and the buffers of `found` are the numbers expected."""
    names = named_leaves(found.params) | named_leaves(found.buffers)
    assert names.keys() == expected.keys()
    for name, value in names.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    for name, value in named_leaves(found.ema).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def inside(arrays, name="vae"):
    return {f"{name}.{key}": value for key, value in arrays.items()}


def own(task, seed, part):
    """What a state of this seed has in a part."""
    before = state(task, seed)
    arrays = named_leaves(before.params) | named_leaves(before.buffers)
    return {name: value for name, value in arrays.items() if name.startswith(f"{part}.")}


@pytest.mark.parametrize("target", [PLAIN, DECODER])
@pytest.mark.parametrize("source", [PLAIN, DECODER])
def test_whether_the_encoder_is_trained_does_not_matter(source, target, tmp_path):
    there = saved(tmp_path, source)
    check(init_from_run(tmp_path, state(target, 1)), there)


def test_a_vae_without_a_discriminator_gets_a_new_one(tmp_path):
    there = saved(tmp_path, PLAIN)
    found = init_from_run(tmp_path, state(ADVERSARIAL, 1, MESH.build()), ["discriminator"])
    kernel = found.params["vae"]["decoder"]["conv_in"]["kernel"].get_value()
    assert (
        kernel.sharding.spec
        == state(ADVERSARIAL, 1, MESH.build())
        .params["vae"]["decoder"]["conv_in"]["kernel"]
        .get_value()
        .sharding.spec
    )
    fresh = own(ADVERSARIAL, 1, "discriminator")
    for name, value in named_leaves(found.ema).items():
        expected = inside(there) | fresh
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    check(found, inside(there) | fresh)


def test_a_discriminator_of_the_same_shape_goes_on_and_another_begins_anew(tmp_path):
    there = saved(tmp_path, ADVERSARIAL)
    check(init_from_run(tmp_path, state(ADVERSARIAL, 1), ["discriminator"]), there)
    shape = dataclasses.replace(ADVERSARY.discriminator, base_dim=8)
    wider = dataclasses.replace(PLAIN, adversary=dataclasses.replace(ADVERSARY, discriminator=shape))
    vae = {name: value for name, value in there.items() if name.startswith("vae.")}
    found = init_from_run(tmp_path, state(wider, 1), ["discriminator"])
    check(found, vae | own(wider, 1, "discriminator"))


def test_a_vae_starts_from_one_with_a_discriminator(tmp_path):
    there = saved(tmp_path, ADVERSARIAL)
    vae = {name.removeprefix("vae."): value for name, value in there.items() if name.startswith("vae.")}
    check(init_from_run(tmp_path, state(DECODER, 1)), vae)


@pytest.mark.parametrize("save", [save_vae, save_diffusers], ids=["own", "diffusers"])
def test_a_vae_alone_is_enough(save, tmp_path):
    vae = random_module(lambda: PLAIN.build(nnx.Rngs(0)), 2)
    save(vae, tmp_path)
    there = named_leaves(nnx.state(load_vae(tmp_path), graph=False))
    check(init_from_run(tmp_path, state(DECODER, 1)), there)
    check(
        init_from_run(tmp_path, state(ADVERSARIAL, 1, MESH.build()), ["discriminator"]),
        inside(there) | own(ADVERSARIAL, 1, "discriminator"),
    )
    other = dataclasses.replace(PLAIN, model=dataclasses.replace(MODEL, latent_channels=4))
    with pytest.raises(CheckpointError, match=r"post_quant_conv\.bias: \(3,\), expected \(4,\)"):
        init_from_run(tmp_path, state(other, 1))


def test_the_lora_of_a_run_is_merged_whether_the_next_one_trains_all_or_another_lora(tmp_path):
    plain = TextToVideoTask(
        vae="unused",
        dit=dataclasses.replace(DIT_VARIANTS["tiny"], text_dim=32),
        text=ByteEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=32, max_bytes=16),
    )
    lora = dataclasses.replace(plain, lora=LoRAOptions(rank=2, alpha=6.0, targets=r"blocks\.ffn\..*"))
    there = saved(tmp_path, lora)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        init_from_run(tmp_path, state(plain, 1))
    (tmp_path / "checkpoints").rename(tmp_path / "kept")
    claim_workdir(Experiment(task=lora, data=SpritesData()), tmp_path)
    (tmp_path / "kept").rename(tmp_path / "checkpoints")

    expected = {name: value for name, value in there.items() if ".low_rank." not in name}
    for name in ("dit.blocks.ffn.up", "dit.blocks.ffn.down"):
        down, up = (np.asarray(there[f"{name}.low_rank.{side}"]) for side in ("down", "up"))
        expected[f"{name}.kernel"] = expected[f"{name}.kernel"] + 3.0 * np.einsum("lir,lro->lio", down, up)
    assert len(expected) < len(there)
    other = dataclasses.replace(plain, lora=LoRAOptions(rank=1, targets=r"blocks\.self_attention\.query"))
    for task in (plain, other):
        found = init_from_run(tmp_path, state(task, 1, MESH.build()))
        names = named_leaves(found.params) | named_leaves(found.buffers)
        assert names.keys() - expected.keys() == {name for name in names if ".low_rank." in name}
        for name, value in expected.items():
            np.testing.assert_allclose(names[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_arrays_that_nothing_takes_are_named(tmp_path):
    saved(tmp_path, dataclasses.replace(PLAIN, model=dataclasses.replace(MODEL, num_res_blocks=2)))
    with pytest.raises(CheckpointError, match=r"arrays that this one does not(.|\n)*blocks\.1\.conv1"):
        init_from_run(tmp_path, state(PLAIN, 1))


def test_another_model_is_refused_by_name(tmp_path):
    saved(tmp_path, PLAIN)
    other = dataclasses.replace(PLAIN, model=dataclasses.replace(MODEL, latent_channels=4))
    with pytest.raises(CheckpointError, match=r"post_quant_conv\.bias: shape \(3,\) in .*, \(4,\) expected"):
        init_from_run(tmp_path, state(other, 1))
    deeper = dataclasses.replace(PLAIN, model=dataclasses.replace(MODEL, num_res_blocks=2))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.conv1\.bias: missing in the checkpoint"):
        init_from_run(tmp_path, state(deeper, 1))
    with pytest.raises(
        CheckpointError, match=re.escape("nowhere/checkpoints is missing: expected the workdir")
    ):
        init_from_run(tmp_path / "nowhere", state(PLAIN, 1))
