import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

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
