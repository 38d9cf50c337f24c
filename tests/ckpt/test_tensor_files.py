"""Weights files that are damaged or hostile, and what is kept beside weights."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vidgen.ckpt.tensor_files import TensorFiles, TensorSpec, WeightsError, write_tensors
from vidgen.ckpt.weights import check_weights, load_weights, save_weights, tensor_shapes
from vidgen.core.errors import UserError

NAME = "w.safetensors"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header, data=b"\0" * 8):
    """Bytes of a file with that header, text or JSON."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE = {
    "empty": b"",
    "three bytes": b"abc",
    "length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length of 1 GB": struct.pack("<Q", 10**9) + b"{}",
    "header cut off": raw({"a": F32})[:20],
    "data cut off": raw({"a": F32})[:-1],
    "data left over": raw({"a": F32}, b"\0" * 9),
    "overlap": raw({"a": F32, "b": F32}),
    "gap": raw({"a": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
    "backward": raw({"a": {**F32, "data_offsets": [8, 0]}}),
    "negative": raw({"a": {**F32, "data_offsets": [-8, 0]}}),
    "negative shape": raw({"a": {**F32, "shape": [-2]}}),
    "huge shape": raw({"a": {**F32, "shape": [2**62, 2**62]}}),
    "other size": raw({"a": {**F32, "shape": [3]}}),
    "unknown type": raw({"a": {**F32, "dtype": "F33"}}),
    "complex": raw({"a": {**F32, "dtype": "C64", "shape": [1]}}),
    "twice": raw('{"a": ' + json.dumps(F32) + ', "a": ' + json.dumps(F32) + "}"),
    "list": raw("[]", b""),
    "null": raw("null", b""),
    "no entry": raw({"a": 3}),
    "no JSON": raw("{" * 100),
    "deep": raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "no text": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": F32}),
    "escape sequence": raw({"a\x1b[2J": F32}),
    "long name": raw({"a" * 100_000: F32}),
    "surrogate": raw('{"\\ud800": ' + json.dumps(F32) + "}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_and_hostile_files_are_named(kind, tmp_path):
    (tmp_path / NAME).write_bytes(HOSTILE[kind])
    with pytest.raises(WeightsError, match=r"w\.safetensors"):
        TensorFiles(tmp_path / NAME)


def test_devices_pipes_and_folders_are_no_weights(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "zero"):
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors is no regular file"):
            TensorFiles(tmp_path / f"{name}.safetensors")


def test_a_pickle_beside_missing_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors is missing.*pytorch_model\.bin, a pickle"):
        TensorFiles(tmp_path / NAME)


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "/dev/zero",
        "a/x.safetensors",
        "..",
        "",
        "x.bin",
        "x" * 244 + ".safetensors",
        "x\0.safetensors",
        3,
        None,
    ],
)
def test_an_index_names_safetensors_of_its_own_folder_only(place, tmp_path):
    folder = tmp_path / "inside"
    for path in (tmp_path / "x.safetensors", folder / "a" / "x.safetensors", folder / "x.bin"):
        save_weights(path, {"a": np.ones(2, np.float32)})
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(UserError, match=r"w\.safetensors\.index\.json: a is said to be in .*same folder"):
        TensorFiles(folder / NAME)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 100_000])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / f"{NAME}.index.json").write_text(text)
    with pytest.raises(UserError, match=r"w\.safetensors\.index\.json"):
        TensorFiles(tmp_path / NAME)


def test_files_of_an_index_that_hold_the_same_tensor(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_weights(tmp_path / name, {"a": np.ones(2, np.float32), name[0]: np.ones(1, np.float32)})
    places = {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightsError, match=r"y\.safetensors holds \['a'\], which another file"):
        TensorFiles(tmp_path / NAME)


def test_a_snapshot_of_links_is_read(tmp_path):
    """As Hugging Face's cache keeps files: blobs, and a folder of links to them."""
    save_weights(tmp_path / "blobs" / "0123", {"a": np.arange(3.0)}, metadata={"made": "here"})
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    (tmp_path / "snapshots" / "main" / NAME).symlink_to("../../blobs/0123")
    files = TensorFiles(tmp_path / "snapshots" / "main" / NAME)
    np.testing.assert_array_equal(files.read("a"), np.arange(3.0))
    assert files.metadata == {"made": "here"}


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_integers_are_no_weights(dtype, tmp_path):
    save_file({"a": np.ones((2, 2), dtype), "b": np.ones(2, np.float16)}, tmp_path / NAME)
    wanted = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    with pytest.raises(WeightsError, match=rf"\(1 tensors\)(.|\n)*a: of type {np.dtype(dtype)} in the file"):
        load_weights(tmp_path / NAME, wanted)
    with pytest.raises(WeightsError, match="a: of type"):
        check_weights(tmp_path / NAME, wanted)
    with pytest.raises(WeightsError, match="b: of type float16 in the file, expected int32"):
        load_weights(tmp_path / NAME, {"b": jnp.zeros(2, jnp.int32)}, ignore="a")


def test_a_long_list_of_tensors_that_do_not_fit_is_cut(tmp_path):
    save_weights(tmp_path / NAME, {"a": np.ones(2)})
    wanted = {f"b{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(1000)}
    with pytest.raises(WeightsError, match=r"\(1001 tensors\)(.|\n)*and 941 more") as caught:
        load_weights(tmp_path / NAME, wanted)
    assert len(str(caught.value)) < 10_000


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    def broken():
        yield np.ones(2, np.float32)
        raise OSError("the disk is full")

    save_weights(tmp_path / NAME, {"a": np.arange(3.0)})
    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(OSError, match="the disk is full"):
        write_tensors(tmp_path / NAME, specs, broken())
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    np.testing.assert_array_equal(TensorFiles(tmp_path / NAME).read("a"), np.arange(3.0))


@pytest.fixture
def scaled():
    """Two layers: one scale for all of a matrix, and one for each of its rows."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 4, 3)).astype(ml_dtypes.float8_e4m3fn)
    rows = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
    tensors = {
        "model.scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
        "model.0.weight": weight[0],
        "model.0.scale_weight": np.array(0.3, np.float32),
        "model.0.scale_input": np.array(7.0, np.float32),
        "model.1.weight": weight[1],
        "model.1.weight_scale": rows,
        "model.1.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
        "model.norm": np.ones(3, np.float16),
    }
    expected = weight.astype(np.float32) * np.stack([np.full(4, 0.3, np.float32), rows])[..., None]
    return tensors, expected


def write(path, tensors):
    write_tensors(path, {k: TensorSpec(v.shape, v.dtype) for k, v in tensors.items()}, tensors.values())


@pytest.mark.parametrize("keep_dtypes", [False, True])
def test_scaled_8_bit_floats_are_multiplied_by_their_scale(scaled, tmp_path, keep_dtypes):
    tensors, expected = scaled
    write(tmp_path / NAME, tensors)
    wanted = {f"model.{i}.weight": jnp.zeros((4, 3)) for i in (0, 1)} | {"model.norm": jnp.zeros(3)}
    assert tensor_shapes(tmp_path / NAME) == {name: leaf.shape for name, leaf in wanted.items()}
    loaded = load_weights(tmp_path / NAME, wanted, keep_dtypes=keep_dtypes)
    for i in (0, 1):
        assert loaded[f"model.{i}.weight"].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[f"model.{i}.weight"], expected[i])
    assert loaded["model.norm"].dtype == (jnp.float16 if keep_dtypes else jnp.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.2.scale_weight", np.array(1.0, np.float32), r"scales model\.2\.weight, found none"),
        ("model.0.weight", np.ones((4, 3), np.float32), "found float32; expected 8-bit floats"),
        (
            "model.0.scale_weight",
            np.ones(3, np.float32),
            r"expected one floating point number, or one for each",
        ),
        ("model.0.scale_weight", np.array(1, np.int32), "expected one floating point number"),
        ("model.0.scale_weight", np.array(np.nan, np.float32), "is not finite"),
        ("model.1.comfy_quant", np.frombuffer(b'{"format": "int8"}', np.uint8), "is of format 'int8'"),
        ("model.1.comfy_quant", np.frombuffer(b"[[[", np.uint8), "not JSON"),
    ],
)
def test_scales_that_mean_nothing(scaled, name, tensor, message, tmp_path):
    write(tmp_path / NAME, {**scaled[0], name: tensor})
    with pytest.raises(UserError, match=rf"w\.safetensors: .*{message}"):
        tensor_shapes(tmp_path / NAME)
