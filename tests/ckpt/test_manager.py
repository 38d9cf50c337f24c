import json
import os
import resource
import shutil
import signal
import threading

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


def descriptors_and_threads():
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors by /proc")
def test_saves_leave_neither_descriptors_nor_threads(tmp_path):
    saved = {"x": jnp.arange(3.0)}
    with CheckpointManager(tmp_path, keep=1) as manager:
        for step in range(5):
            manager.save(step, saved)
        manager.wait()
        before = descriptors_and_threads()
        for step in range(5, 10):
            manager.save(step, saved)
        manager.wait()
        assert descriptors_and_threads() == before


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path):
    """Damages a file in one way after another, says how, and mends it."""
    whole = path.read_bytes()
    places = {0, len(whole) // 3, len(whole) // 2, len(whole) - 1} if whole else ()
    flips = {
        f"bit of byte {n} flipped": whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :]
        for n in places
    }
    for what, data in {"emptied": b"", "cut": whole[: len(whole) // 2], **flips, "removed": None}.items():
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        yield f"{path.name} {what}"
    path.write_bytes(whole)


def pair(directory):
    """Two small checkpoints, of the steps 4 and 8; returns their states."""
    old, new = (
        {
            "x": scale * jax.random.normal(jax.random.key(0), (3000,)),
            "y": nnx.State({"z": nnx.Param(jnp.full(5, scale))}),
        }
        for scale in (1.0, 2.0)
    )
    with CheckpointManager(directory) as manager:
        manager.save(4, old, {"data": {"next": 4}})
        manager.save(8, new, {"data": {"next": 8}})
    return {4: old, 8: new}


def restores_what_was_saved(directory, saved, caplog, what):
    """The step that is restored, bit by bit, with a warning where it is not the newest."""
    caplog.clear()
    with CheckpointManager(directory) as reader:
        step, found, parts = reader.restore(abstract(saved[8]), parts=("data",))
    assert parts == {"data": {"next": step}}, what
    same(found, saved[step])
    ours = [record for record in caplog.records if record.name.startswith("vidgen")]
    warned = [record.getMessage() for record in ours if record.levelname == "WARNING"]
    if step == 8:
        assert warned == [], what
    else:
        damaged, used = warned
        assert "8 is damaged: " in damaged and len(damaged) < 600, what
        assert used == "the checkpoint of step 4 is used instead, 4 steps before"
    return step


# Reads of TensorStore that end after one has failed find no event loop to tell it to.
late = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@late
def test_a_flipped_bit_in_the_values_of_an_array_is_found(tmp_path, caplog):
    saved = pair(tmp_path)
    data = max(files_of(tmp_path / "8" / "state"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    assert restores_what_was_saved(tmp_path, saved, caplog, data) == 4
    assert "1 of 2 arrays are not what was saved: x" in caplog.text
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError, match=r"8 is damaged .*: choose another of the steps \[4, 8\]"):
            manager.restore(abstract(saved[8]), 8)
        _, named = manager.restore_named({"x": abstract(saved[8])["x"]})
        same(named["x"], saved[4]["x"])


@late
@pytest.mark.parametrize("name", ["manifest.ocdbt", "_CHECKPOINT_METADATA", "state", "data", "manifest"])
def test_a_newest_checkpoint_that_lacks_something_is_passed_over(tmp_path, caplog, name):
    saved = pair(tmp_path)
    for path in [tmp_path / "8" / name, *(tmp_path / "8" / "state").rglob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # Without a manifest it may be of an older version; without the metadata of the step nothing is lost.
    expected = 8 if name in ("manifest", "_CHECKPOINT_METADATA") else 4
    assert restores_what_was_saved(tmp_path, saved, caplog, name) == expected


@late
@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "array_metadatas/process_0"])
def test_json_of_a_checkpoint_that_is_nested_too_deep_is_passed_over(tmp_path, caplog, name):
    saved = pair(tmp_path)
    file = tmp_path / "8" / "state" / name
    whole = file.read_text()
    file.write_text("[" * 100_000)
    assert restores_what_was_saved(tmp_path, saved, caplog, name) == 4
    if name == "_METADATA":  # An array a thousand levels down.
        values = json.loads(whole)
        leaf = next(iter(values["tree_metadata"].values()))
        leaf["key_metadata"] *= 1000
        file.write_text(json.dumps(values))
        assert restores_what_was_saved(tmp_path, saved, caplog, name) == 4
        assert "tree_metadata is no list of arrays" in caplog.text


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"init_timestamp_nsecs": "x"}', '{"metrics": 1}'])
def test_metadata_of_a_step_that_orbax_does_not_take_is_named(tmp_path, text):
    pair(tmp_path)
    (tmp_path / "8" / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(CheckpointError, match=r"8/_CHECKPOINT_METADATA is damaged: remove this file"):
        CheckpointManager(tmp_path)


@late
@pytest.mark.slow
def test_whatever_is_damaged_the_values_are_those_that_were_saved(tmp_path, caplog):
    saved = pair(tmp_path)
    steps = [
        restores_what_was_saved(tmp_path, saved, caplog, what)
        for path in files_of(tmp_path / "8")
        for what in damage(path)
    ]
    assert steps.count(4) > 20


@late
def test_the_run_that_writes_moves_what_is_damaged_and_saves_that_step_again(tmp_path, caplog):
    saved = pair(tmp_path)
    (tmp_path / "8" / "state" / "manifest.ocdbt").write_bytes(b"")
    with CheckpointManager(tmp_path, cleanup=True) as manager:
        step, _, _ = manager.restore(abstract(saved[8]))
        assert step == 4 and manager.steps() == [4]
        assert "going on from step 4, to repeat 4 steps" in caplog.text
        manager.save(8, saved[8], {"data": {"next": 8}})
    assert restores_what_was_saved(tmp_path, saved, caplog, "saved again") == 8
    assert (tmp_path / "8.damaged" / "state").is_dir()


@late
def test_when_none_is_whole_one_error_says_so_of_each(tmp_path):
    saved = pair(tmp_path)
    for step in ("4", "8"):
        (tmp_path / step / "state" / "manifest.ocdbt").write_bytes(b"")
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(
            CheckpointError, match=r"no checkpoint is whole: .*8 is damaged .*; .*4 is damaged"
        ) as e,
    ):
        manager.restore(abstract(saved[8]))
    assert "another model" not in str(e.value) and "\n" not in str(e.value)


def test_arrays_of_another_type_are_checked_and_then_cast(tmp_path):
    saved = {"x": jnp.linspace(0, 1, 7)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, saved)
        wanted = {"x": jax.ShapeDtypeStruct((7,), jnp.bfloat16, sharding=saved["x"].sharding)}
        _, restored, _ = manager.restore(wanted)
    np.testing.assert_array_equal(restored["x"], saved["x"].astype(jnp.bfloat16))
    assert restored["x"].dtype == jnp.bfloat16


def test_a_checkpoint_of_before_digests_is_restored_with_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    saved = pair(tmp_path)
    shutil.rmtree(tmp_path / "8" / "manifest")
    assert restores_what_was_saved(tmp_path, saved, caplog, "no digests") == 8
    assert "8 is from before checkpoints had digests" in caplog.text


def test_a_full_disk_is_one_error_and_the_checkpoint_before_stays(tmp_path, capfd):
    """A limit on the size of files stands for the disk: the system's error takes the same way."""
    small, large = ({"x": jax.random.normal(jax.random.key(0), (n,))} for n in (10, 50_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointManager(tmp_path, cleanup=True) as manager:
        manager.save(1, small)
        manager.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            manager.save(2, large)
            with pytest.raises(
                CheckpointError, match=r"2 could not be written .* of step 1\. Make room"
            ) as error:
                manager.save(3, small)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(str(error.value)) < 800 and "\n" not in str(error.value)
        assert manager.steps() == [1] and [path.name for path in tmp_path.iterdir()] == ["1"]
        manager.save(3, small)
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1, 3]
    assert "Traceback" not in capfd.readouterr().err


def test_signals_while_the_last_checkpoint_is_written_wait_for_it(tmp_path, monkeypatch):
    saved = {"x": jnp.arange(3.0)}
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    # pytest-xdist's workers ignore SIGINT.
    interrupted_before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        manager = CheckpointManager(tmp_path)
        manager.save(1, saved)
        _, response = manager._saving
        result = response.result

        def during():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert received == []
            return result()

        monkeypatch.setattr(response, "result", during)
        with pytest.raises(KeyboardInterrupt):
            manager.close()
        assert received == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupted_before)
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1]
