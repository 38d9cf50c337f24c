"""Multi-process programs: start-up, sharding of a batch over processes, stop at a common step."""

import math
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, PyTree
from vidgen.parallel.rules import RULES, batch_sharding

__all__ = [
    "all_agree",
    "anywhere",
    "broadcast_text",
    "check_rows",
    "check_tokens",
    "global_batch",
    "initialize",
    "is_main_process",
    "is_shared",
    "row_shard",
    "stop_requested_anywhere",
    "sync",
]

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process to the others of the program; call before the first use of a device.

    Arguments that are None come from the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID). With the coordinator "auto", jax detects the cluster (TPU pods, Slurm, ...). Without a
    coordinator the program has one process and this does nothing.

    Args:
      coordinator: host:port of process 0, or "auto".

    Raises:
      UserError: a coordinator address without the number of processes or without this process's index.
    """
    coordinator = coordinator or os.environ.get(COORDINATOR)
    if coordinator is None:
        return
    if coordinator == "auto":
        os.environ.pop(COORDINATOR, None)  # jax would read "auto" as an address.
        jax.distributed.initialize()
        return
    num_processes = _number(num_processes, NUM_PROCESSES)
    process_id = _number(process_id, PROCESS_ID)
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _number(value: int | None, variable: str) -> int:
    text = os.environ.get(variable) if value is None else str(value)
    if text is None or not text.isdecimal():
        raise UserError(f"a coordinator is given, and {variable} is {text!r}: give a number")
    return int(text)


def is_main_process() -> bool:
    """Whether this is process 0, which prints and writes files."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(holds: bool) -> bool:
    """Whether `holds` is true on every process; a collective, which every process must call."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def broadcast_text(text: str) -> str:
    """The `text` of process 0, on every process; a collective, which every process must call."""
    if jax.process_count() == 1:
        return text
    data = text.encode() if is_main_process() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    padded = np.zeros(length, np.uint8)
    if is_main_process():
        padded[:] = np.frombuffer(data, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8)).decode()


def is_shared(mesh: Mesh) -> bool:
    """Whether the mesh holds devices of more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def anywhere(flags: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Elementwise "any" of `flags` over processes; a collective, called by all with equally many flags."""
    return np.asarray(np.asarray(multihost_utils.process_allgather(flags)).any(0))


def stop_requested_anywhere(step: int, requested_here: bool) -> bool:
    """Whether to stop after `step`: True at the same step on every process.

    With one process it is `requested_here`. With several, jax's coordination service listens for SIGTERM on
    each and agrees on a step; every process must call this at every step.
    """
    if jax.process_count() == 1:
        return requested_here
    return multihost_utils.reached_preemption_sync_point(step)


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """The part of a global batch that this process must load: (index, count), the arguments of a `Loader`.

    Processes whose devices hold the same examples (they shard the model, not the batch) get the same index.

    Raises:
      UserError: the processes do not hold equal contiguous parts of the batch.
    """
    rows_of: dict[int, set[int]] = {}
    batch_axes = [mesh.axis_names.index(name) for name in RULES["batch"]]
    for position, device in np.ndenumerate(mesh.devices):
        row = 0
        for axis in batch_axes:
            row = row * mesh.devices.shape[axis] + position[axis]
        rows_of.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    total = sum(len(part) for part in parts)
    equal = all(part == tuple(range(i * len(part), (i + 1) * len(part))) for i, part in enumerate(parts))
    if not equal or total != len(set().union(*rows_of.values())):
        raise UserError(
            f"the mesh {dict(mesh.shape)} over {len(rows_of)} processes gives them unequal rows of a batch "
            f"(process: rows, {rows_of}): make data * fsdp a multiple or a divisor of the number of processes"
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def global_batch(arrays: PyTree[np.ndarray], mesh: Mesh) -> PyTree[Array]:
    """Global arrays, sharded over the mesh along the first axis, from this process's part of a batch.

    Raises:
      UserError: data * fsdp does not divide the global batch size.
    """
    sharding = batch_sharding(mesh)
    _, count = row_shard(mesh)

    def place(path: jax.tree_util.KeyPath, array: np.ndarray) -> Array:
        rows = len(array) * count
        check_rows(rows, mesh, jax.tree_util.keystr(path, simple=True, separator="."))
        return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

    return jax.tree_util.tree_map_with_path(place, arrays)


def check_rows(rows: int, mesh: Mesh, name: str = "clips", *, parts: int = 1) -> None:
    """Checks that a global batch of `rows` examples (or packed rows) can be sharded over the mesh.

    Args:
      name: what the error message calls them.
      parts: number of micro-batches, each of which is sharded over the mesh.

    Raises:
      UserError: data * fsdp * parts does not divide `rows`.
    """
    ways = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
    if rows % (ways * parts):
        inside = f" in {parts} micro-batches" if parts > 1 else ""
        fewer = ", or run.grad_accumulation smaller" if parts > 1 else ""
        raise UserError(
            f"a batch of {rows} rows ({name}){inside} does not divide over data * fsdp = {ways} devices: "
            f"make batch_size a multiple of {ways * parts}{fewer}, or make data * fsdp of the mesh smaller"
        )


def check_tokens(tokens: int, mesh: Mesh) -> None:
    """Checks that a clip of `tokens` tokens can be sharded over the mesh axis `context`.

    Raises:
      UserError: `context` does not divide `tokens`.
    """
    ways = mesh.shape["context"]
    if tokens % ways:
        raise UserError(
            f"a clip of {tokens} tokens does not divide over context = {ways} devices: give the mesh "
            f"context = {math.gcd(tokens, ways)}, or choose a clip size with a multiple of {ways} tokens"
        )
