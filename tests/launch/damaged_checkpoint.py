"""A program of two processes: saves two checkpoints of sharded arrays, damages the newer, restores."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import batch_sharding
from vidgen.train.workdir_lock import WorkdirLock, WorkdirLockedError


def main(directory):
    """Arguments: the directory."""
    processes.initialize()
    sharding = batch_sharding(MeshOptions(data=4).build())
    values = np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
    states = [
        {"x": jax.make_array_from_callback(values.shape, sharding, lambda i, scale=scale: scale * values[i])}
        for scale in (1, 2)
    ]
    checkpoints = pathlib.Path(directory) / "checkpoints"
    with (
        WorkdirLock(workdir=pathlib.Path(directory)),
        CheckpointManager(checkpoints, cleanup=True) as manager,
    ):
        refused = False
        try:
            WorkdirLock(workdir=pathlib.Path(directory)).__enter__()
        except WorkdirLockedError:
            refused = True
        manager.save(1, states[0])
        manager.save(2, states[1], {"data": {"next": 2}})
        manager.wait()
        processes.sync("saved")
        if processes.is_main_process():
            files = [path for path in (checkpoints / "2" / "state").rglob("*") if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            whole = largest.read_bytes()
            largest.write_bytes(whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:])
        processes.sync("damaged")
        abstract = jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=sharding)
        step, restored, _ = manager.restore({"x": abstract})
        steps = manager.steps()
        for path in (checkpoints / "1" / "state").rglob("manifest.ocdbt"):
            path.unlink(missing_ok=True)
        processes.sync("damaged all")
        try:
            manager.restore({"x": abstract})
            none = False
        except CheckpointError as error:
            none = "no checkpoint is whole" in str(error)
    same = all(np.array_equal(shard.data, values[shard.index]) for shard in restored["x"].addressable_shards)
    verdict = f"refused {refused} step {step} left {steps} same {same} none {none}"
    (pathlib.Path(directory) / f"verdict_{jax.process_index()}").write_text(verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
