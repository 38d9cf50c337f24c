import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.nn.variables import Buffer
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings


def state(mesh, scale=1.0):
    tree = {
        "params": nnx.State(
            {
                "kernel": nnx.Param(scale * jnp.arange(64.0).reshape(8, 8), axes=("embed", "mlp")),
                "list": {0: {"bias": nnx.Param(jnp.ones(8))}},
            }
        ),
        "buffers": nnx.State({"count": Buffer(jnp.float32(3))}),
        "key": jax.random.key(7),
    }
    return jax.device_put(tree, shardings(tree, mesh))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def values(tree):
    return {**tree, "key": jax.random.key_data(tree["key"])}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restores_every_bit_onto_another_mesh_with_its_json_parts(tmp_path):
    saved = state(MeshOptions(fsdp=4, tensor=2).build())
    with CheckpointManager(tmp_path) as manager:
        manager.save(5, saved, {"data": {"next_index": 40, "names": ["a"]}})
    other = state(MeshOptions(data=1, fsdp=2, tensor=2).build(jax.devices()[:4]), scale=0.0)
    with CheckpointManager(tmp_path) as manager:
        step, restored, parts = manager.restore(abstract(other), parts=("data",))
    assert step == 5 and parts == {"data": {"next_index": 40, "names": ["a"]}}
    same(values(restored), values(saved))
    assert restored["params"]["kernel"].get_metadata("axes") == ("embed", "mlp")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, other)))


def test_a_part_of_the_state_is_restored_alone(tmp_path):
    saved = state(MeshOptions().build())
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, saved)
        wanted = abstract({"buffers": saved["buffers"]})
        _, restored, _ = manager.restore(wanted, partial=True)
        same(restored, {"buffers": saved["buffers"]})
        with pytest.raises(CheckpointError, match=r"key: only in the checkpoint"):
            manager.restore(wanted)


def test_keeps_the_newest_and_the_milestones(tmp_path):
    saved = state(MeshOptions().build())
    with CheckpointManager(tmp_path, every=2, keep=2, keep_every=4) as manager:
        assert [step for step in range(1, 9) if manager.should_save(step)] == [2, 4, 6, 8]
        for step in range(2, 13, 2):
            manager.save(step, saved)
        manager.save(12, saved)  # There already: not an error.
        manager.wait()
        assert manager.latest_step() == 12
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [4, 8, 10, 12]


def test_what_a_killed_save_left_behind_is_ignored_and_cleaned_by_the_writer_only(tmp_path):
    saved = state(MeshOptions().build())
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, saved)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    with CheckpointManager(tmp_path) as reader:
        assert reader.steps() == [1] and half.exists()
    with CheckpointManager(tmp_path, cleanup=True) as writer:
        assert writer.steps() == [1]
        writer.save(3, saved)
        assert not half.exists()


def test_errors_say_where_what_and_what_to_do(tmp_path):
    saved = state(MeshOptions().build())
    with CheckpointManager(tmp_path / "c") as manager:
        with pytest.raises(CheckpointError, match=r"c has no complete checkpoint: train first"):
            manager.restore(abstract(saved))
        manager.save(3, saved)
        manager.wait()
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; there are \[3\]"):
            manager.restore(abstract(saved), 4)
        with pytest.raises(CheckpointError, match=r"3 lacks data"):
            manager.restore(abstract(saved), parts=("data",))
        other = {**abstract(saved), "extra": jax.ShapeDtypeStruct((2,), jnp.float32)}
        other["params"] = nnx.State({"kernel": nnx.Param(jax.ShapeDtypeStruct((8, 9), jnp.float32))})
        with pytest.raises(CheckpointError) as caught:
            manager.restore(other)
    message = str(caught.value)
    assert "3 arrays differ" in message
    assert "extra: missing in the checkpoint" in message
    assert "params.list.0.bias: only in the checkpoint" in message
    assert "params.kernel: shape (8, 8) in the checkpoint, (8, 9) expected" in message
