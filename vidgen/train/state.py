"""The state of a training run: everything that a step changes, sharded from initialization on."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core import rng
from vidgen.core.tree import named_leaves
from vidgen.core.typing import Array, Key, PyTree
from vidgen.nn.variables import Buffer, Constant
from vidgen.parallel.rules import shardings
from vidgen.train.task import Task

__all__ = [
    "FrozenState",
    "TrainState",
    "abstract_base",
    "abstract_state",
    "ema_model",
    "init_state",
    "merge_model",
    "place_frozen",
    "restore_averaged",
    "with_stored_base",
]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenState:
    """Weights that a step reads and does not change.

    Attributes:
      base: the trained module's `Constant`s.
      modules: states of the task's frozen modules, by name.
    """

    base: Any = dataclasses.field(default_factory=lambda: nnx.State({}))
    modules: Any = dataclasses.field(default_factory=dict)

    def merge(self, graphdefs: Mapping[str, nnx.GraphDef]) -> dict[str, nnx.Module]:
        """The frozen modules."""
        return {name: nnx.merge(graphdefs[name], _copy(state)) for name, state in self.modules.items()}


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
    return _placed(abstract, mesh), graphdef


def abstract_base(task: Task, mesh: Mesh) -> nnx.State:
    """Shapes, dtypes and shardings of the trained module's `Constant`s."""
    with jax.set_mesh(mesh):
        base = nnx.state(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), Constant, graph=False)
    return _placed(base, mesh)


def merge_model(graphdef: nnx.GraphDef, params: PyTree, buffers: PyTree, base: nnx.State) -> nnx.Module:
    """Module of copies of the variables."""
    return nnx.merge(graphdef, *_copy((params, buffers, base)))


def ema_model(state: TrainState, graphdef: nnx.GraphDef, base: nnx.State) -> nnx.Module:
    """Module with averaged weights and current buffers, for evaluation and sampling."""
    return merge_model(graphdef, state.ema, state.buffers, base)


def with_stored_base(
    checkpoints: CheckpointManager, abstract: TrainState, base: nnx.State, step: int | None = None
) -> TrainState:
    """`abstract`, with `base` in float32 among the buffers if the checkpoint has it there.

    Older versions saved the weights that LoRA leaves unchanged.

    Args:
      base: from `abstract_base`.
    """
    names = {f"buffers.{name}" for name in named_leaves(base)}
    if not names or not names <= checkpoints.shapes(step).keys():
        return abstract
    as_saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), base)
    return dataclasses.replace(abstract, buffers=nnx.merge_state(abstract.buffers, as_saved))


def restore_averaged(
    workdir: pathlib.Path | str, abstract: TrainState, base: nnx.State, step: int | None = None
) -> tuple[int, Any, Any]:
    """Averaged parameters and buffers of a run's checkpoint; reads nothing else.

    Args:
      abstract: from `abstract_state`; its optimizer may differ from the run's.
      base: from `abstract_base`.
      step: step of the checkpoint; None is the newest.

    Returns:
      The step, parameters, buffers; the latter with the base if an older version saved it.

    Raises:
      CheckpointError: there is no such checkpoint, or it is of another model.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: expected the workdir of a training run")
    with CheckpointManager(directory) as checkpoints:
        wanted = {"ema": abstract.ema, "buffers": with_stored_base(checkpoints, abstract, base, step).buffers}
        step, state, _ = checkpoints.restore(wanted, step, partial=True)
    return step, state["ema"], state["buffers"]


def place_frozen(
    modules: Mapping[str, nnx.Module], mesh: Mesh
) -> tuple[dict[str, nnx.GraphDef], dict[str, nnx.State]]:
    """Graph definitions and states of read-only modules, with the states placed on the mesh."""
    split = {name: nnx.split(module, graph=False) for name, module in modules.items()}
    return (
        {name: graphdef for name, (graphdef, _) in split.items()},
        {name: jax.device_put(state, shardings(state, mesh)) for name, (_, state) in split.items()},
    )


def _copy(tree: PyTree) -> PyTree:
    """New variables: they can only be written at the trace level that created them."""
    return jax.tree.map(lambda x: x, tree)


def _placed(tree: PyTree, mesh: Mesh) -> PyTree:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh))


def _initial(task: Task, tx: optax.GradientTransformation):
    def initial(key: Key[Array, ""]) -> TrainState:
        module = task.build(nnx.Rngs(rng.stream(key, "params")))
        _, params, buffers, _ = nnx.split(module, nnx.Param, Buffer, Constant, graph=False)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            buffers=buffers,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=tx.init(params),
            key=rng.stream(key, "train"),
        )

    return initial
