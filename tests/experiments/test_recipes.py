"""Training Wan's weights further: a tiny checkpoint that diffusers saved, a folder of videos, the command."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import vidgen
from tests.few_devices import few_devices
from tests.pipeline.tiny_wan import KINDS, make_checkpoint
from vidgen.ckpt.manager import CheckpointError
from vidgen.cli import export
from vidgen.cli.train import main
from vidgen.core.tree import named_leaves
from vidgen.data.video_io import save_video
from vidgen.models.dit.diffusers_folder import load_diffusers, read_config
from vidgen.parallel.mesh import MeshOptions
from vidgen.sampling.conditioners import ConcatFrames

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
EXPERIMENT = "experiments/dit/wan.py"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for index in range(2):
        frames = rng.integers(0, 256, (100, 24, 32, 3), dtype=np.uint8)
        save_video(folder / f"{index}.mp4", frames, fps=8.0)
        (folder / f"{index}.txt").write_text(f"noise number {index}")
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "wan"
    make_checkpoint(KINDS["2.1 T2V, Euler"], folder)
    return folder


def shape(folder):
    """The options that give the transformer in `folder`."""
    config = read_config(folder)
    names = ("in_channels", "out_channels", "model_dim", "num_layers", "num_heads", "ffn_dim", "text_dim")
    return {f"task.dit.{name}": getattr(config, name) for name in (*names, "freq_dim")}


def train(workdir, videos, wan, overrides, argument="lora,tiny"):
    values = {
        **shape(wan / "transformer"),
        "task.vae": wan,
        "task.text_encoder.path": wan,
        "task.text_encoder.cache": workdir.with_name("captions"),
        "task.text_encoder.dtype": "float32",
        "run.init_from": wan,
        "data.path": videos,
        "data.heldout_every": 4,
        **overrides,
    }
    options = [f"--config.{key}={value}" for key, value in values.items() if value is not None]
    with few_devices(2):
        return main([f"--config={EXPERIMENT}:{argument}", f"--workdir={workdir}", *options])


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, videos, wan):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    rank = {"task.lora.rank": 2, "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 1}
    assert train(workdir, videos, wan, rank) == 0
    return workdir


def test_a_lora_run_begins_from_wans_weights_and_leaves_them_as_they_are(lora_run, wan):
    from vidgen.train.restore import load_run

    mesh = MeshOptions().build(jax.devices()[:1])
    _, step, model = load_run(lora_run, mesh)
    assert step == 2
    expected = named_leaves(nnx.state(load_diffusers(wan / "transformer")))
    found = named_leaves(nnx.state(model.dit))
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    updates = {name: leaf for name, leaf in found.items() if ".low_rank." in name}
    assert len(updates) == 2 * 10 and all(np.abs(leaf).max() > 0 for leaf in updates.values())


def test_its_updates_are_exported_alone_and_give_the_same_videos(lora_run, wan, tmp_path):
    out = tmp_path / "mine.safetensors"
    assert export.main([str(lora_run), "--format", "lora", "--out", str(out)]) == 0
    mesh = MeshOptions().build(jax.devices()[:1])
    call = {"num_frames": 5, "height": 16, "width": 16, "steps": 2, "guidance_scale": 2.0}
    trained = vidgen.load(lora_run, mesh=mesh, dtype="float32")
    with_update = vidgen.load(wan, mesh=mesh)
    before = named_leaves(nnx.state(with_update.model))["dit.blocks.ffn.up.kernel"]
    with_update.add_lora(out)
    for name, leaf in named_leaves(nnx.state(with_update.model)).items():
        other = named_leaves(nnx.state(trained.model))[name]
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6, err_msg=name)
    after = named_leaves(nnx.state(with_update.model))["dit.blocks.ffn.up.kernel"]
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-6
    assert trained("noise", **call).shape == (5, 16, 16, 3)


def test_it_is_exported_merged_in_diffusers_layout(lora_run, tmp_path):
    out = tmp_path / "merged"
    assert export.main([str(lora_run), "--format", "diffusers", "--out", str(out)]) == 0
    mesh = MeshOptions().build()
    expected = named_leaves(nnx.state(vidgen.load(lora_run, mesh=mesh).model.dit))
    for name, leaf in named_leaves(nnx.state(load_diffusers(out / "transformer"))).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_captions_are_encoded_once(lora_run):
    kept = list(lora_run.with_name("captions").rglob("*.safetensors"))
    assert len(kept) >= 3, "two captions and the empty one"


@pytest.mark.slow
def test_image_to_video_with_channels_beside(tmp_path, videos, wan):
    concat = {"task.dit.in_channels": 10, "task.dit.out_channels": 4}
    concat["task.conditioners"] = [{"kind": "concat_frames"}]
    overrides = {**concat, "run.init_from": None, "task.lora.rank": 2, "run.num_steps": 1}
    assert train(tmp_path / "run", videos, wan, overrides) == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0
    assert vidgen.load(tmp_path / "run").conditioners[1:] == (ConcatFrames(),)


def test_weights_and_options_that_do_not_belong_together(tmp_path, videos, wan):
    from vidgen.ckpt.weights import WeightsError
    from vidgen.core.config import ConfigError

    with pytest.raises(CheckpointError, match=r"the run trains \['text.*give it task\.text_encoder"):
        train(tmp_path / "a", videos, wan, dict.fromkeys(ENCODER) | {"task.text.dim": 24})
    with pytest.raises(WeightsError, match=r"set task\.dit to the shape of these weights"):
        train(tmp_path / "b", videos, wan, {"task.dit.ffn_dim": 32})
    with pytest.raises(
        ConfigError, match=r"dit\.in_channels: the transformer takes .*'concat_latents', which no"
    ):
        train(tmp_path / "c", videos, wan, {"task.dit.in_channels": 10, "task.dit.out_channels": 4})


ENCODER = ("task.text_encoder.path", "task.text_encoder.cache", "task.text_encoder.dtype")
