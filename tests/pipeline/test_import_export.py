"""Checkpoints in and out keep every bit, and what is written runs in diffusers."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import vidgen
from tests.few_devices import few_devices
from tests.pipeline.tiny_wan import KINDS, make_checkpoint
from vidgen.ckpt.tensor_files import TensorFiles, WeightsError
from vidgen.ckpt.weights import save_weights
from vidgen.cli import export, import_
from vidgen.core.tree import named_leaves
from vidgen.models.dit.diffusers_folder import load_diffusers
from vidgen.models.dit.wan_file import load_wan, save_wan
from vidgen.parallel.mesh import MeshOptions
from vidgen.pipeline.importing import import_checkpoint, new_folder
from vidgen.sampling.conditioners import ConcatFrames

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Wan 2.1's image to video in bfloat16, its transformer in several files."""
    folder = tmp_path_factory.mktemp("wan") / "wan"
    reference = make_checkpoint(KINDS["2.1 I2V"], folder)
    reference.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


@pytest.fixture(scope="module")
def mesh():
    return MeshOptions(data=1, fsdp=8).build()


@pytest.fixture
def one_device():
    with few_devices(1):
        yield


def tensors(folder):
    """All tensors of a part, by name, as stored."""
    (path,) = {
        path.with_name(path.name.split("-0")[0].removesuffix(".safetensors") + ".safetensors")
        for path in folder.glob("*.safetensors")
    }
    files = TensorFiles(path)
    return {name: files.read(name) for name in files.shapes}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_what_is_imported_and_exported_again_is_the_same_bit_for_bit(checkpoint, tmp_path):
    assert import_.main([str(checkpoint), "--to", str(tmp_path / "a")]) == 0
    assert export.main([str(tmp_path / "a"), "--format", "diffusers", "--out", str(tmp_path / "b")]) == 0
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        assert_equal(tensors(tmp_path / "b" / part), tensors(checkpoint / part))
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert json.loads((tmp_path / "b" / "model_index.json").read_text()) == index
    import diffusers

    reference = diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path / "b")
    assert reference.scheduler.config.flow_shift == 3.0


def test_a_file_with_wans_names_is_the_same_transformer(checkpoint, mesh, tmp_path):
    dit = load_diffusers(checkpoint / "transformer", mesh, keep_dtypes=True)
    save_wan(dit, tmp_path / "wan.safetensors")
    with safe_open(tmp_path / "wan.safetensors", framework="numpy") as file:
        assert "blocks.1.cross_attn.k_img.weight" in file.keys()  # noqa: SIM118
    again = load_wan(tmp_path / "wan.safetensors", mesh, num_heads=2)
    assert again.config == dit.config
    for name, leaf in named_leaves(nnx.state(dit)).items():
        found = named_leaves(nnx.state(again))[name]
        assert found.dtype == leaf.dtype and found.sharding == leaf.sharding
        np.testing.assert_array_equal(found, leaf)
    # As ComfyUI has it, with what the checkpoint lacks from another place.
    prefixed = {f"model.diffusion_model.{k}": v for k, v in load_torch(tmp_path / "wan.safetensors").items()}
    save_torch(prefixed, tmp_path / "comfy.safetensors")
    arguments = [str(tmp_path / "comfy.safetensors"), "--num-heads", "2", "--to", str(tmp_path / "a")]
    assert import_.main([*arguments, "--parts", str(checkpoint)]) == 0
    for part in ("transformer", "vae"):
        assert_equal(tensors(tmp_path / "a" / part), tensors(checkpoint / part))
    assert ConcatFrames() in vidgen.load(tmp_path / "a", mesh=mesh).conditioners


def test_two_experts_as_their_authors_publish_them(mesh, tmp_path):
    make_checkpoint(KINDS["2.2 T2V A14B"], tmp_path / "wan")
    for part, name in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        save_wan(load_diffusers(tmp_path / "wan" / part), tmp_path / "original" / name / WEIGHTS)
        config = {"_class_name": "WanModel", "num_heads": 2}
        (tmp_path / "original" / name / "config.json").write_text(json.dumps(config))
    import_checkpoint(tmp_path / "original", tmp_path / "a", mesh=mesh, parts=tmp_path / "wan")
    for part in ("transformer", "transformer_2"):
        assert_equal(tensors(tmp_path / "a" / part), tensors(tmp_path / "wan" / part))
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and index["transformer_2"][1] == "WanTransformer3DModel"


@pytest.mark.usefixtures("one_device")
def test_a_trained_run_goes_out_and_in_again(tiny_runs, tmp_path):
    assert export.main([str(tiny_runs.dit), "--out", str(tmp_path / "out")]) == 0
    mesh = MeshOptions().build()
    run, exported = vidgen.load(tiny_runs.dit, mesh=mesh), vidgen.load(tmp_path / "out", mesh=mesh)
    for ours, theirs in ((run.model, exported.model), (run.vae.decoder, exported.vae.decoder)):
        left, right = named_leaves(nnx.state(ours)), named_leaves(nnx.state(theirs))
        assert left.keys() == right.keys()
        for name, leaf in left.items():
            np.testing.assert_array_equal(leaf, right[name], err_msg=name)
    import diffusers

    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")


@pytest.mark.usefixtures("one_device")
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_other_formats(tiny_runs, tmp_path, format):
    assert export.main([str(tiny_runs.dit), "--format", format, "--out", str(tmp_path / "out")]) == 0
    model = vidgen.load(tiny_runs.dit).model
    kernel = np.asarray(model.dit.blocks.ffn.up.kernel[...])
    if format == "safetensors":
        file = TensorFiles(tmp_path / "out" / "transformer.safetensors")
        np.testing.assert_array_equal(file.read("blocks.1.ffn.0.weight").T, kernel[1])
        assert "encoder.conv1.weight" in TensorFiles(tmp_path / "out" / "vae.safetensors").shapes
    else:
        from orbax.checkpoint import v1 as ocp

        arrays = ocp.load(str(tmp_path / "out" / "weights"))
        np.testing.assert_array_equal(arrays["model"]["dit.blocks.ffn.up.kernel"], kernel)


def test_pickles_are_refused_with_the_remedy(checkpoint, mesh, tmp_path):
    (tmp_path / "wan").mkdir()
    for name in ("Wan2.1_VAE.pth", "model.pt"):
        (tmp_path / "wan" / name).write_bytes(b"")
        for source in (tmp_path / "wan" / name, tmp_path / "wan"):
            with pytest.raises(ValueError, match=r"is a pickle, which can run any code.*safetensors"):
                import_checkpoint(source, tmp_path / "a", mesh=mesh)
    shutil.copytree(checkpoint, tmp_path / "pickled")
    (tmp_path / "pickled" / "text_encoder" / "model.safetensors").rename(
        tmp_path / "pickled" / "text_encoder" / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"text_encoder.pytorch_model\.bin is a pickle"):
        import_checkpoint(tmp_path / "pickled", tmp_path / "a", mesh=mesh)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_sources_that_cannot_be_imported(checkpoint, mesh, tmp_path):
    to = tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        import_checkpoint(tmp_path / "none", to, mesh=mesh)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no transformer in safetensors files"):
        import_checkpoint(tmp_path / "empty", to, mesh=mesh)
    with pytest.raises(FileNotFoundError, match=r"is no whole checkpoint for diffusers"):
        import_checkpoint(checkpoint, to, mesh=mesh, parts=tmp_path / "empty")
    save_weights(tmp_path / "other.safetensors", {"a": np.ones(3, np.float32)})
    with pytest.raises(WeightsError, match=r"is no transformer of Wan: expected .* found a \.\.\."):
        import_checkpoint(tmp_path / "other.safetensors", to, mesh=mesh)
    save_wan(load_diffusers(checkpoint / "transformer"), tmp_path / "wan.safetensors")
    with pytest.raises(WeightsError, match="a width of 24 is no multiple of 128"):
        import_checkpoint(tmp_path / "wan.safetensors", to, mesh=mesh)
    shutil.copytree(checkpoint, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "vae")
    with pytest.raises(FileNotFoundError, match=r"vae is missing, which .*model_index\.json lists"):
        import_checkpoint(tmp_path / "part", to, mesh=mesh)
    with pytest.raises(ValueError, match="is not an empty folder: name another one"):
        import_checkpoint(checkpoint, tmp_path / "part", mesh=mesh)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("a")) == []


def test_a_folder_appears_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text(str(1 // 0))
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("1")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_an_exported_sampler_runs_where_only_jax_is(tiny_runs, tmp_path):
    arguments = ["--format", "stablehlo", "--out", str(tmp_path / "sampler"), "--steps", "2"]
    assert export.main([str(tiny_runs.dit), *arguments]) == 0
    code = (tmp_path / "sampler" / "sample.py").read_text()
    imported = {line.split()[1].partition(".")[0] for line in code.splitlines() if line.startswith("import")}
    assert imported == {"jax", "json", "numpy", "pathlib", "sys"}
    command = [sys.executable, "-P", str(tmp_path / "sampler" / "sample.py"), "a red circle moves left", "3"]
    # Without the site's packages that nothing of it may need.
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    expected = vidgen.load(tiny_runs.dit, mesh=MeshOptions().build(jax.devices()[:1]))(
        "a red circle moves left", seed=3, steps=2
    )
    (found,) = np.load(tmp_path / "video.npy")
    assert np.abs(found.astype(int) - expected).max() <= 1 and expected.std() > 1
