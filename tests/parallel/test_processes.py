import inspect
import types

import jax
import numpy as np
import pytest

from vidgen.parallel import processes
from vidgen.parallel.mesh import AXES, MeshOptions


def test_one_process_holds_all_rows_and_cuts_them_over_the_mesh():
    mesh = MeshOptions(fsdp=2, tensor=2).build()
    assert processes.row_shard(mesh) == (0, 1)
    rows = np.arange(24).reshape(8, 3)
    batch = processes.global_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(batch, rows)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match=r"batch of 6 rows \(x\) does not divide over data \* fsdp = 4"):
        processes.global_batch({"x": rows[:6]}, mesh)


def fake_mesh(processes_of_devices, shape):
    devices = np.empty(len(processes_of_devices), object)
    devices[:] = [types.SimpleNamespace(process_index=index) for index in processes_of_devices]
    sizes = dict(zip(AXES, shape, strict=True))
    return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=AXES, shape=sizes)


@pytest.mark.parametrize(
    ("owners", "shape", "expected"),
    [
        ([0, 0, 1, 1], (4, 1, 1, 1), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (2, 1, 1, 2), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 2, 1, 2), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 1, 2, 2), [(0, 1), (0, 1)]),  # Both hold every row.
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_each_process_loads_the_rows_that_its_devices_hold(monkeypatch, owners, shape, expected):
    mesh = fake_mesh(owners, shape)
    for process, part in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert inspect.unwrap(processes.row_shard)(mesh) == part


def test_rows_that_cannot_be_shared_equally_are_an_error():
    with pytest.raises(ValueError, match="unequal rows"):
        inspect.unwrap(processes.row_shard)(fake_mesh([0, 1, 0, 1, 1, 1], (3, 1, 1, 2)))


def test_initialize_needs_all_three_numbers(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    processes.initialize()  # One process: nothing to do.
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is None: give a number"):
        processes.initialize("localhost:1")
