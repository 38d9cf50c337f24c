import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.ckpt.weights import WeightsError, load_weights, save_weights
from vidgen.parallel.mesh import MeshOptions


def tree():
    return nnx.State(
        {
            "block": {"kernel": nnx.Param(jnp.arange(32.0).reshape(4, 8)), "bias": nnx.Param(jnp.ones(8))},
            "steps": nnx.Param(jnp.array(3, jnp.int32)),
        }
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_round_trip_keeps_every_bit_and_leaves_one_file(tmp_path):
    save_weights(tmp_path / "a" / "w.safetensors", tree(), metadata={"made": "here"})
    loaded = load_weights(tmp_path / "a" / "w.safetensors", abstract(tree()))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree())
    jax.tree.map(np.testing.assert_array_equal, loaded, tree())
    assert loaded["steps"].dtype == jnp.int32
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["w.safetensors"]


def test_sharded_arrays_are_saved_whole_and_loaded_onto_the_mesh(tmp_path):
    mesh = MeshOptions(fsdp=4, tensor=2).build()
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    kernel = jax.device_put(jnp.arange(32.0).reshape(4, 8), sharding)
    save_weights(tmp_path / "w.safetensors", {"kernel": kernel})
    wanted = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=sharding)}
    loaded = load_weights(tmp_path / "w.safetensors", wanted)["kernel"]
    assert loaded.sharding == sharding and loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded, kernel.astype(jnp.bfloat16))


def test_shapes_evaluated_under_a_mesh_name_no_device_and_are_loaded_all_the_same(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"kernel": jnp.ones((4, 8))})
    with jax.set_mesh(MeshOptions(fsdp=4, tensor=2).build()):
        wanted = jax.eval_shape(lambda: {"kernel": jnp.zeros((4, 8))})
        loaded = load_weights(tmp_path / "w.safetensors", wanted)["kernel"]
    np.testing.assert_array_equal(loaded, np.ones((4, 8)))


def test_missing_extra_and_misshaped_tensors_are_all_named(tmp_path):
    save_weights(tmp_path / "w.safetensors", tree())
    wanted = {
        "block": {"kernel": jnp.zeros((4, 9)), "gain": jnp.zeros(2)},
        "steps": jnp.array(0, jnp.int32),
    }
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path / "w.safetensors", wanted)
    message = str(caught.value)
    assert "w.safetensors does not fit the model (3 tensors)" in message
    assert "block.gain: missing in the file, expected (2,)" in message
    assert "block.bias: only in the file, (8,)" in message
    assert "block.kernel: (4, 8) in the file, expected (4, 9)" in message


def test_absent_and_truncated_files_are_errors_that_name_them(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors is missing"):
        load_weights(path, {})
    save_weights(path, tree())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"w\.safetensors is no complete safetensors file"):
        load_weights(path, abstract(tree()))


def test_several_files_with_an_index_are_one(tmp_path):
    arrays = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}
    for number, (name, array) in enumerate(arrays.items(), 1):
        save_weights(tmp_path / f"w-0000{number}-of-00002.safetensors", {name: array})
    index = {"weight_map": {name: f"w-0000{i}-of-00002.safetensors" for i, name in enumerate(arrays, 1)}}
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_weights(tmp_path / "w.safetensors", arrays)
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays)
    assert loaded["b"].dtype == jnp.bfloat16
    (tmp_path / "w-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"w-00002-of-00002\.safetensors is missing"):
        load_weights(tmp_path / "w.safetensors", arrays)
    save_weights(tmp_path / "w-00002-of-00002.safetensors", {"c": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"lacks \['b'\], which w\.safetensors\.index\.json lists"):
        load_weights(tmp_path / "w.safetensors", arrays)


@pytest.mark.parametrize("spec", [None, PartitionSpec("fsdp", "tensor"), PartitionSpec(None, None, "fsdp")])
def test_layers_of_one_array_are_tensors_of_their_own_elsewhere(spec, tmp_path):
    names = {"kernel": TensorMapping("layers.{}.weight", (2, 0, 1), reshape=(2, 3, 4), stacked=True)}
    kernel = np.arange(96, dtype=np.float32).reshape(4, 6, 4)
    save_weights(tmp_path / "w.safetensors", {"kernel": kernel}, names=names)
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {f"layers.{layer}.weight" for layer in range(4)}
        expected = kernel[1].reshape(2, 3, 4).transpose(2, 0, 1)
        np.testing.assert_array_equal(file.get_tensor("layers.1.weight"), expected)
    mesh = MeshOptions(fsdp=4, tensor=2).build()
    sharding = None if spec is None else NamedSharding(mesh, spec)
    wanted = {"kernel": jax.ShapeDtypeStruct(kernel.shape, jnp.float32, sharding=sharding)}
    loaded = load_weights(tmp_path / "w.safetensors", wanted, names=names)["kernel"]
    assert sharding is None or loaded.sharding == sharding
    np.testing.assert_array_equal(loaded, kernel)
    with pytest.raises(WeightsError, match=r"layers\.4\.weight: missing in the file, expected \(4, 2, 3\)"):
        load_weights(tmp_path / "w.safetensors", {"kernel": jnp.zeros((5, 6, 4))}, names=names)
