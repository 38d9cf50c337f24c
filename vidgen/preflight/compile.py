"""The real training step of an experiment, compiled ahead of time for devices that need not exist."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vidgen.core.typing import PyTree
from vidgen.data.buckets import Bucket, training_sizes, with_size
from vidgen.data.latents_data import LatentsData
from vidgen.models.lpips.model import LPIPS
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import RULES, batch_sharding, shardings
from vidgen.preflight.flops import matmul_flops
from vidgen.preflight.text_encoder import encoder_bytes_of
from vidgen.preflight.topology import GIB, PreflightError
from vidgen.train.experiment import Experiment
from vidgen.train.optimizer import partitioned
from vidgen.train.power_law import averaging
from vidgen.train.state import TrainState, abstract_state
from vidgen.train.step import make_train_step
from vidgen.train.task import Task
from vidgen.train.trainer import step_options
from vidgen.train.vae_task import VAETask

__all__ = ["CompiledStep", "TooLarge", "compile_or_refusal", "compile_step", "largest_sizes", "placed"]


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
      encoder_bytes: of the weights of the task's text encoder on one device; 0 where there is none.
      flops: of the whole step's matrix products and convolutions, over all devices.
      executable: what the compiler made, or its refusal.
      seconds: that tracing and compiling took.
    """

    mesh: Mesh
    state: TrainState
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    encoder_bytes: int
    flops: float
    executable: jax.stages.Compiled | TooLarge
    seconds: float


def compile_step(experiment: Experiment, mesh: Mesh, vae: VAEConfig | None = None) -> CompiledStep:
    """Compiles what `vidgen.train.loop.fit` runs: same task, optimizer, options and shardings.

    Nothing is computed and no array is made, of the weights or of anything else. Of several buckets, all that
    could need the most memory are compiled, and the one that does is returned.

    Args:
      mesh: over devices that exist, or over those of `topology_devices`.
      vae: shape of the frozen VAE, for the tasks that use one.

    Raises:
      PreflightError: the batch does not divide over the mesh.
    """
    start = time.monotonic()
    task, options = experiment.task, experiment.run
    optimizer = partitioned(experiment.optimizer, task.param_groups, options.num_steps)
    transformation = averaging(optimizer, options.power_law)
    state, graphdef = abstract_state(task, transformation, mesh)
    frozen_graphdef, frozen = _abstract_frozen(task, vae, mesh)
    schedule = experiment.optimizer.schedule(options.num_steps)
    step: Any = make_train_step(
        task, graphdef, frozen_graphdef, transformation, step_options(options), schedule
    )
    encoder_bytes = encoder_bytes_of(task, mesh)

    def compiled(batch: dict[str, jax.ShapeDtypeStruct]) -> CompiledStep:
        with jax.set_mesh(mesh):
            traced = step.trace(state, frozen, batch)
            executable = compile_or_refusal(traced)
        return CompiledStep(
            mesh=mesh,
            state=state,
            frozen=frozen,
            batch=batch,
            encoder_bytes=encoder_bytes,
            flops=matmul_flops(traced.jaxpr),
            executable=executable,
            seconds=time.monotonic() - start,
        )

    return max(map(compiled, _abstract_batches(experiment, task, mesh, vae)), key=_needed)


def _needed(step: CompiledStep) -> tuple[bool, int]:
    """By which steps of one state are compared: those that the compiler refuses are the largest."""
    if isinstance(step.executable, TooLarge):
        return True, step.executable.needed_bytes
    found: Any = step.executable.memory_analysis()
    return False, found.argument_size_in_bytes + found.temp_size_in_bytes


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


def _abstract_batches(
    experiment: Experiment, task: Task, mesh: Mesh, vae: VAEConfig | None
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Batches as `vidgen.parallel.processes.global_batch` lays them out.

    Of packed clips it is one of rows; of clips, one for each size that `largest_sizes` gives.
    """
    data, rows = experiment.data, experiment.run.batch_size
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    of_sizes = [(data, rows)]
    if not isinstance(data, LatentsData):
        config = task.model if isinstance(task, VAETask) else vae
        sizes = largest_sizes(training_sizes(data, rows), 1 if config is None else config.temporal_factor)
        of_sizes = [(with_size(data, size), size.batch_size or rows) for size in sizes]
    batches = []
    for data, rows in of_sizes:
        parts = experiment.run.grad_accumulation
        if (rows // parts) % ways:
            raise PreflightError(
                f"a batch_size of {rows} in {parts} micro-batches does not fit data * fsdp = {ways} devices: "
                f"make it a multiple of {ways * parts}"
            )
        batch = task.batch_spec(data, rows)
        batches.append(placed(batch, dict.fromkeys(batch, batch_sharding(mesh))))
    return batches


def largest_sizes(sizes: Sequence[Bucket], temporal_factor: int) -> list[Bucket]:
    """The sizes of batches that could need the most memory: no other one is as large in every way.

    Ways are what grows with memory: pixels (the VAE), latents (tokens), and scores of attention, within a
    clip and within its frames. An image of as many pixels as a clip has more tokens.
    """

    def ways(size: Bucket) -> tuple[int, ...]:
        clips, area = size.batch_size or 1, size.height * size.width
        frames = 1 + (size.num_frames - 1) // temporal_factor
        return (
            clips * size.num_frames * area,
            clips * frames * area,
            clips * (frames * area) ** 2,
            clips * frames * area**2,
        )

    found: dict[tuple[int, ...], Bucket] = {}
    for size in sizes:
        found.setdefault(ways(size), size)
    return [
        size
        for mine, size in found.items()
        if not any(mine != other and all(a <= b for a, b in zip(mine, other, strict=True)) for other in found)
    ]


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
