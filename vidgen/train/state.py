"""The state of a training run: everything that a step changes, sharded over the mesh from birth."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core import rng
from vidgen.core.tree import named_leaves
from vidgen.core.typing import Array, Key
from vidgen.nn.variables import Buffer
from vidgen.parallel.rules import shardings
from vidgen.train.task import Task

__all__ = ["TrainState", "abstract_state", "ema_model", "init_state", "place_frozen", "restore_averaged"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step takes and gives back. The graph definition of the module stays outside.

    Parameters, optimizer moments and EMA are float32; the moments and the EMA carry their parameters' logical
    axes. In their places may also be `jax.ShapeDtypeStruct`s, or shardings.

    Attributes:
      step: int32 [], steps done.
      params: the `nnx.Param`s of the module.
      buffers: its `Buffer`s.
      ema: averaged parameters.
      opt_state: of the optimizer.
      key: typed random key; a step uses it folded with its number.
    """

    step: Any
    params: Any
    buffers: Any
    ema: Any
    opt_state: Any
    key: Any


def init_state(
    task: Task, tx: optax.GradientTransformation, key: Key[Array, ""], mesh: Mesh
) -> tuple[TrainState, nnx.GraphDef]:
    """The state before the first step, each shard made on the device where it stays.

    The numbers depend on `key` only, not on the mesh.

    Raises:
      TypeError: a parameter that is not float32.
    """
    abstract, graphdef = abstract_state(task, tx, mesh)
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # One random stream per parameter is a lot of code that runs once: on CPU, optimizing it takes minutes.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    with jax.set_mesh(mesh):
        initial = jax.jit(_initial(task, tx), out_shardings=out_shardings, compiler_options=options)
        return initial(key), graphdef


def abstract_state(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, nnx.GraphDef]:
    """Shapes, types and shardings of the state, computing nothing: what a checkpoint is restored into."""
    with jax.set_mesh(mesh):
        # Not even a key is made: the mesh may be of devices that are not here (vidgen/preflight).
        abstract = jax.eval_shape(_initial(task, tx), jax.eval_shape(lambda: jax.random.key(0)))
        graphdef = nnx.split(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), graph=False)[0]
    for name, leaf in named_leaves(abstract.params).items():
        if leaf.dtype != jnp.float32:
            raise TypeError(
                f"parameter {name} is {leaf.dtype}: parameters are kept in float32, cast where they are used"
            )
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, shardings(abstract, mesh)), graphdef


def ema_model(state: TrainState, graphdef: nnx.GraphDef) -> nnx.Module:
    """The module with averaged weights and current buffers: what is sampled from and evaluated."""
    copy = jax.tree.map(lambda x: x, (state.ema, state.buffers))
    return nnx.merge(graphdef, *copy)


def restore_averaged(
    workdir: pathlib.Path | str, abstract: TrainState, step: int | None = None
) -> tuple[int, Any, Any]:
    """The averaged parameters and the buffers of a run's checkpoint; nothing else is read.

    Args:
      abstract: as `abstract_state` gives it; the optimizer may be another than the run's.
      step: which checkpoint; None is the newest.

    Returns:
      The step, parameters, buffers.

    Raises:
      CheckpointError: there is no such checkpoint, or it is of another model.
    """
    wanted = {"ema": abstract.ema, "buffers": abstract.buffers}
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: expected the workdir of a training run")
    with CheckpointManager(directory) as checkpoints:
        step, state, _ = checkpoints.restore(wanted, step, partial=True)
    return step, state["ema"], state["buffers"]


def place_frozen(module: nnx.Module | None, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State] | None:
    """A module that is only read, split and laid over the mesh."""
    if module is None:
        return None
    graphdef, state = nnx.split(module, graph=False)
    return graphdef, jax.device_put(state, shardings(state, mesh))


def _initial(task: Task, tx: optax.GradientTransformation):
    def initial(key: Key[Array, ""]) -> TrainState:
        module = task.build(nnx.Rngs(rng.stream(key, "params")))
        _, params, buffers = nnx.split(module, nnx.Param, Buffer, graph=False)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            buffers=buffers,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=tx.init(params),
            key=rng.stream(key, "train"),
        )

    return initial
