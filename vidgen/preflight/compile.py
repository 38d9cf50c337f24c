"""The real training step of an experiment, compiled ahead of time for devices that need not exist."""

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core.typing import PyTree
from vidgen.data.buckets import Bucket, training_sizes
from vidgen.data.latents_data import LatentsData
from vidgen.models.lpips.model import LPIPS
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import RULES, batch_sharding, shardings
from vidgen.preflight.flops import matmul_flops
from vidgen.preflight.topology import GIB, PreflightError
from vidgen.train.experiment import Experiment
from vidgen.train.optimizer import partitioned
from vidgen.train.power_law import averaging
from vidgen.train.state import TrainState, abstract_state
from vidgen.train.step import make_train_step
from vidgen.train.task import Task
from vidgen.train.trainer import step_options
from vidgen.train.vae_task import VAETask

__all__ = ["CompiledStep", "TooLarge", "compile_or_refusal", "compile_step", "placed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The compiler's refusal: the program needs more memory than a device has.

    Attributes:
      needed_bytes: as the compiler states it.
      message: its own words.
    """

    needed_bytes: int
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A training step and what it was compiled for.

    Attributes:
      state, frozen, batch: arguments, as `jax.ShapeDtypeStruct`s with shardings.
      flops: of the whole step's matrix products and convolutions, over all devices.
      executable: what the compiler made, or its refusal.
      seconds: that tracing and compiling took.
    """

    mesh: Mesh
    state: TrainState
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    flops: float
    executable: jax.stages.Compiled | TooLarge
    seconds: float


def compile_step(experiment: Experiment, mesh: Mesh, vae: VAEConfig | None = None) -> CompiledStep:
    """Compiles what `vidgen.train.loop.fit` runs: same task, optimizer, options and shardings.

    Nothing is computed and no array is made, of the weights or of anything else.

    Args:
      mesh: over devices that exist, or over those of `topology_devices`.
      vae: shape of the frozen VAE, for the tasks that use one.

    Raises:
      PreflightError: the batch does not divide over the mesh.
    """
    start = time.monotonic()
    task, options = experiment.task, experiment.run
    optimizer = partitioned(experiment.optimizer, task.apart, options.num_steps)
    transformation = averaging(optimizer, options.power_law)
    state, graphdef = abstract_state(task, transformation, mesh)
    frozen_graphdef, frozen = _abstract_frozen(task, vae, mesh)
    batch = _abstract_batch(experiment, task, mesh)
    schedule = experiment.optimizer.schedule(options.num_steps)
    step: Any = make_train_step(
        task, graphdef, frozen_graphdef, transformation, step_options(options), schedule
    )
    with jax.set_mesh(mesh):
        traced = step.trace(state, frozen, batch)
        executable = compile_or_refusal(traced)
    return CompiledStep(
        mesh=mesh,
        state=state,
        frozen=frozen,
        batch=batch,
        flops=matmul_flops(traced.jaxpr),
        executable=executable,
        seconds=time.monotonic() - start,
    )


def compile_or_refusal(traced: Any) -> jax.stages.Compiled | TooLarge:
    """What the compiler makes of a `jax.stages.Traced`, or its refusal where memory does not suffice."""
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _refusal(str(error))
        if refusal is None:
            raise
        return refusal


def _abstract_frozen(
    task: Task, vae: VAEConfig | None, mesh: Mesh
) -> tuple[nnx.GraphDef, PyTree] | tuple[None, None]:
    """What `task.frozen` would read from files: the VAE, or the network of the perceptual loss."""
    if vae is not None:
        module = nnx.eval_shape(lambda: VideoVAE(vae, rngs=nnx.Rngs(0)))
    elif isinstance(task, VAETask) and task.perceptual_weight:
        module = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0)))
    else:
        return None, None
    graphdef, state = nnx.split(module, graph=False)
    return graphdef, placed(state, shardings(state, mesh))


def _abstract_batch(experiment: Experiment, task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as `vidgen.parallel.processes.global_batch` lays it out, from the arrays of one empty clip.

    Of several buckets, that with the most pixels in a batch; of packed clips, a row without any.
    """
    data, rows = experiment.data, experiment.run.batch_size
    if isinstance(data, LatentsData):
        packing = data.packing
        one = {
            "rows": [[]],
            "tokens_per_row": packing.tokens_per_row,
            "clips_per_row": packing.clips_per_row,
        }
    else:
        size = max(training_sizes(data, rows), key=_pixels)
        rows = size.batch_size or rows
        video = np.zeros((1, size.num_frames, size.height, size.width, 3), np.uint8)
        one = {"video": video, "caption": [""], "name": [""]}
    ways = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
    micro = rows // experiment.run.grad_accumulation
    if micro % ways:
        raise PreflightError(
            f"a batch_size of {rows} in {experiment.run.grad_accumulation} micro-batches does not fit "
            f"data * fsdp = {ways} devices: make it a multiple of {ways * experiment.run.grad_accumulation}"
        )
    arrays = task.arrays(one)
    batch = {name: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for name, a in arrays.items()}
    return placed(batch, dict.fromkeys(batch, batch_sharding(mesh)))


def _pixels(size: Bucket) -> int:
    return (size.batch_size or 1) * size.num_frames * size.height * size.width


def placed(tree: PyTree, places: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s with these shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def _refusal(message: str) -> TooLarge | None:
    """The compiler's error as a value, where it is about the memory of a device."""
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
    ):
        if match := re.search(pattern, message, re.IGNORECASE):
            needed = int(float(match[1]) * _UNITS[match[2].upper()])
            return TooLarge(needed_bytes=needed, message=message)
    return None
