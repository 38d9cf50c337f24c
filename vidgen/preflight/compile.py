"""Compiles an experiment's real training step ahead of time, for devices that need not exist."""

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
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.rules import RULES, batch_sharding, shardings
from vidgen.preflight.flops import matmul_flops
from vidgen.preflight.text_encoder import encoder_bytes_of
from vidgen.preflight.topology import GIB, PreflightError
from vidgen.train.batch_spec import BatchSpec
from vidgen.train.experiment import Experiment
from vidgen.train.phases import transformation
from vidgen.train.power_law import averaging
from vidgen.train.state import FrozenState, TrainState, abstract_base, abstract_state
from vidgen.train.step import make_train_step
from vidgen.train.task import ExperimentTask
from vidgen.train.trainer import step_options

__all__ = ["CompiledStep", "TooLarge", "compile_or_refusal", "compile_step", "largest_sizes", "placed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The compiler's out-of-memory error: the program needs more memory than a device has.

    Attributes:
      needed_bytes: bytes per device, as the compiler states them.
      message: the compiler's message.
    """

    needed_bytes: int
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A compiled training step, with its mesh and arguments.

    Attributes:
      state, frozen, batch: arguments, as `jax.ShapeDtypeStruct`s with shardings.
      encoder_bytes: bytes of the text encoder's weights on one device; 0 without a text encoder.
      flops: matrix products and convolutions of the whole step, over all devices.
      executable: the compiled program, or the compiler's out-of-memory error.
      seconds: duration of tracing and compiling.
    """

    mesh: Mesh
    state: TrainState
    frozen: FrozenState
    batch: BatchSpec
    encoder_bytes: int
    flops: float
    executable: jax.stages.Compiled | TooLarge
    seconds: float


def compile_step(experiment: Experiment, mesh: Mesh, vae: VAEConfig | None = None) -> CompiledStep:
    """Compiles the step of `vidgen.train.loop.fit`: same task, optimizer, options and shardings.

    It allocates no array and computes nothing. With several buckets it compiles every bucket that could need
    the most memory and returns the one that does.

    Args:
      mesh: of devices that exist, or of `topology_devices`.
      vae: config of the VAE that the task trains or uses; None reads it from the task.

    Raises:
      PreflightError: the batch is not divisible over the mesh.
    """
    start = time.monotonic()
    task, options = experiment.task, experiment.run
    vae = task.vae_config() if vae is None else vae
    tx = averaging(transformation(task.phases, experiment.optimizer, options.num_steps), options.power_law)
    state, graphdef = abstract_state(task, tx, mesh)
    frozen_graphdefs, frozen = _abstract_frozen(task, vae, mesh)
    schedule = experiment.optimizer.schedule(options.num_steps)
    step: Any = make_train_step(task, graphdef, frozen_graphdefs, tx, step_options(options), schedule)
    encoder_bytes = encoder_bytes_of(task.text_encoder, mesh)

    def compiled(batch: BatchSpec) -> CompiledStep:
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
    """Sort key by memory of steps with the same state: out-of-memory errors come last."""
    if isinstance(step.executable, TooLarge):
        return True, step.executable.needed_bytes
    found: Any = step.executable.memory_analysis()
    return False, found.argument_size_in_bytes + found.temp_size_in_bytes


def compile_or_refusal(traced: Any) -> jax.stages.Compiled | TooLarge:
    """Compiles a `jax.stages.Traced`; returns an out-of-memory error of the compiler as `TooLarge`."""
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _refusal(str(error))
        if refusal is None:
            raise
        return refusal


def _abstract_frozen(
    task: ExperimentTask, vae: VAEConfig, mesh: Mesh
) -> tuple[dict[str, nnx.GraphDef], FrozenState]:
    """Abstract version of all that a step only reads."""
    builders = {name: frozen.build for name, frozen in task.frozen().items()}
    if "vae" in builders:
        builders["vae"] = lambda: VideoVAE(vae, rngs=nnx.Rngs(0))
    split = {name: nnx.split(nnx.eval_shape(build), graph=False) for name, build in builders.items()}
    modules = {name: placed(state, shardings(state, mesh)) for name, (_, state) in split.items()}
    graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}
    return graphdefs, FrozenState(base=abstract_base(task, mesh), modules=modules)


def _abstract_batches(
    experiment: Experiment, task: ExperimentTask, mesh: Mesh, vae: VAEConfig
) -> list[BatchSpec]:
    """Abstract batches, sharded as by `vidgen.parallel.processes.global_batch`.

    Packed clips have one batch of packed rows; other data has one batch per size of `largest_sizes`.
    """
    data: Any = experiment.data
    batch_size = experiment.run.batch_size
    num_shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    sized_data = [(data, batch_size)]
    if data.packing is None:
        sizes = largest_sizes(training_sizes(data, batch_size), vae.temporal_factor)
        sized_data = [(with_size(data, size), size.batch_size or batch_size) for size in sizes]
    batches = []
    for data, batch_size in sized_data:
        parts = experiment.run.grad_accumulation
        if (batch_size // parts) % num_shards:
            raise PreflightError(
                f"a batch_size of {batch_size} in {parts} micro-batches does not fit data * fsdp = "
                f"{num_shards} devices: make it a multiple of {num_shards * parts}"
            )
        batch = task.batch_spec(data, batch_size)
        batches.append(placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch)))
    return batches


def largest_sizes(sizes: Sequence[Bucket], temporal_factor: int) -> list[Bucket]:
    """Batch sizes that could need the most memory: those that no other size reaches in every measure.

    The measures are pixels (the VAE), latents (tokens), and attention scores within a clip and within its
    frames. An image with as many pixels as a clip has more tokens.
    """

    def measures(size: Bucket) -> tuple[int, ...]:
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
        found.setdefault(measures(size), size)
    return [
        size
        for this, size in found.items()
        if not any(this != other and all(a <= b for a, b in zip(this, other, strict=True)) for other in found)
    ]


def placed(tree: PyTree, places: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s of `tree` with the shardings `places`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def _refusal(message: str) -> TooLarge | None:
    """Parses the compiler's out-of-memory error; None for any other error."""
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
    ):
        if match := re.search(pattern, message, re.IGNORECASE):
            needed = int(float(match[1]) * _UNITS[match[2].upper()])
            return TooLarge(needed_bytes=needed, message=message)
    return None
