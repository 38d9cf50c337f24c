"""Checkpoints that are hostile or damaged: nothing of the user's is removed, copied or written wrongly."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.pipeline.tiny_wan import KINDS, make_checkpoint
from vidgen.ckpt.weights import save_weights
from vidgen.core.errors import UserError
from vidgen.parallel.mesh import MeshOptions
from vidgen.pipeline.diffusers_folder import load_transformers, read_index
from vidgen.pipeline.importing import import_checkpoint, new_folder
from vidgen.pipeline.parts import copy_part

MESH = MeshOptions(data=1, fsdp=8)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "wan"
    make_checkpoint(KINDS["2.1 I2V"], folder)
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "wan")


def refused(checkpoint, match, *, error=UserError):
    """The import fails, and leaves nothing."""
    target = checkpoint.parent / "new"
    with pytest.raises(error, match=match) as caught:
        import_checkpoint(checkpoint, target, mesh=MESH.build())
    assert sorted(path.name for path in checkpoint.parent.iterdir() if "new" in path.name) == []
    return str(caught.value)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_no_folder_of_the_user_is_touched(tmp_path):
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "precious").write_text("1")
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a", "a.part", "a.part/precious", "a/file"]
    with pytest.raises(UserError, match=r"a is not an empty folder"), new_folder(tmp_path / "a"):
        pytest.fail("the folder is the user's")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("text_encoder", "config.json"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "spiece.model"),
        ("tokenizer", "tokenizer_config.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_links_that_leave_the_checkpoint_are_not_copied(checkpoint, part, file, tmp_path):
    path = checkpoint / part / file
    if not path.exists():
        (checkpoint / part / "tokenizer.json").unlink(missing_ok=True)
        path.write_bytes(b"")
    secret = path.rename(tmp_path / "secret")
    path.symlink_to(secret)
    assert "secret" in refused(checkpoint, rf"{file} is a link to .*outside of")


def test_only_files_of_the_format_are_copied(checkpoint, tmp_path):
    for name in ("notes.txt", "training_args.json", "other.safetensors", "key.model"):
        (checkpoint / "text_encoder" / name).write_text("private")
    copy_part(checkpoint / "text_encoder", tmp_path / "text_encoder")
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_snapshot_of_hugging_faces_cache_is_copied(checkpoint, tmp_path):
    root = tmp_path / "models--wan"
    snapshot = root / "snapshots" / "main" / "text_encoder"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted((checkpoint / "text_encoder").iterdir())):
        path.rename(root / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../../blobs/{number}")
    copy_part(snapshot, tmp_path / "text_encoder")
    copied = tmp_path / "text_encoder" / "config.json"
    assert copied.is_file() and not copied.is_symlink()


def test_pipes_are_not_waited_for(checkpoint):
    (checkpoint / "scheduler" / "scheduler_config.json").unlink()
    os.mkfifo(checkpoint / "scheduler" / "scheduler_config.json")
    refused(checkpoint, r"scheduler_config\.json is no regular file")


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is of 'FluxPipeline'"),
        ("model_index.json", {"text_encoder": 3}, "text_encoder is 3; expected a library and a class"),
        ("model_index.json", {"boundary_ratio": "high"}, "boundary_ratio: found 'high'"),
        ("transformer/config.json", {"eps": "nan"}, "eps: found 'nan'"),
        ("transformer/config.json", {"_class_name": "Flux"}, "is of 'Flux'"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers: found 1000000000"),
        ("vae/config.json", {"latents_std": [1.0, 1.0, 1.0, "nan"]}, "latents_std: found 'nan'"),
        ("text_encoder/config.json", {"model_type": "bert"}, "is of model_type='bert'"),
        ("text_encoder/config.json", {"num_layers": 3}, r"does not fit the model(.|\n)*block\.2\."),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIM"}, "'DDIM' is not supported"),
    ],
)
def test_what_loading_would_refuse_is_not_imported(checkpoint, file, values, match):
    change(checkpoint / file, **values)
    refused(checkpoint, rf"{file}.*{match}" if "does not" not in match else match)


def test_integers_in_the_place_of_weights_are_not_imported(checkpoint):
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    data = path.read_bytes()
    path.write_bytes(data[:8] + data[8 : 8 + length].replace(b'"F32"', b'"I32"') + data[8 + length :])
    refused(checkpoint, r"vae.*\.safetensors does not fit the model(.|\n)*: of type int32 in the file")


def test_an_index_that_is_none(tmp_path):
    for text in ("", "[]", "{", "[" * 100_000, '{"a": 1, "a": 2}'):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UserError, match=r"model_index\.json: "):
            read_index(tmp_path)


def test_pickles_beside_what_is_missing_are_named(checkpoint):
    path = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"is missing.*diffusion_pytorch_model\.bin, a pickle"):
        load_transformers(checkpoint, MESH.build())


def test_a_file_of_a_transformer_with_absurd_names(tmp_path):
    """The shape of a single file comes from its tensors; a block number may be anything."""
    for name in ("blocks.0.self_attn.q.weight", f"blocks.{10**9}.self_attn.q.weight"):
        save_weights(tmp_path / "w.safetensors", {name: np.zeros((128, 128), np.float32)})
        with pytest.raises(UserError, match=r"w\.safetensors"):
            import_checkpoint(tmp_path / "w.safetensors", tmp_path / "new", mesh=MESH.build())
