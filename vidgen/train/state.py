"""The state of a training run: everything that a step changes, sharded from initialization on."""

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
    """Input and output of a training step; the module's graph definition is separate.

    Parameters, optimizer moments and EMA are float32; the moments and the EMA have their parameters' logical
    axes. Leaves may also be `jax.ShapeDtypeStruct`s or shardings.

    Attributes:
      step: int32 [], steps done.
      params: the module's `nnx.Param`s.
      buffers: the module's `Buffer`s.
      ema: averaged parameters.
      opt_state: state of the optimizer.
      key: typed random key; a step folds in its number.
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
    """State before the first step, each shard initialized on its device.

    The values depend on `key` only, not on the mesh.

    Raises:
      TypeError: a parameter is not float32.
    """
    abstract, graphdef = abstract_state(task, tx, mesh)
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # One random stream per parameter makes a large program that runs once; XLA:CPU optimizes it for minutes.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    with jax.set_mesh(mesh):
        initial = jax.jit(_initial(task, tx), out_shardings=out_shardings, compiler_options=options)
        return initial(key), graphdef


def abstract_state(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, nnx.GraphDef]:
    """Shapes, dtypes and shardings of the state, without computing it: the target of a restore."""
    with jax.set_mesh(mesh):
        # Creates no key either: the mesh may have devices that are not present (vidgen/preflight).
        abstract = jax.eval_shape(_initial(task, tx), jax.eval_shape(lambda: jax.random.key(0)))
        graphdef = nnx.split(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), graph=False)[0]
    for name, leaf in named_leaves(abstract.params).items():
        if leaf.dtype != jnp.float32:
            raise TypeError(
                f"parameter {name} is {leaf.dtype}: store parameters in float32, cast them where used"
            )
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, shardings(abstract, mesh)), graphdef


def ema_model(state: TrainState, graphdef: nnx.GraphDef) -> nnx.Module:
    """Module with averaged weights and current buffers, for evaluation and sampling."""
    copy = jax.tree.map(lambda x: x, (state.ema, state.buffers))
    return nnx.merge(graphdef, *copy)


def restore_averaged(
    workdir: pathlib.Path | str, abstract: TrainState, step: int | None = None
) -> tuple[int, Any, Any]:
    """Averaged parameters and buffers of a run's checkpoint; reads nothing else.

    Args:
      abstract: from `abstract_state`; its optimizer may differ from the run's.
      step: step of the checkpoint; None is the newest.

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
    """Graph definition and state of a read-only module, with the state placed on the mesh."""
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
