"""The base of a LoRA run: weights that it does not train, named by their source and in no checkpoint.

The source is `run.init_from`. A run without one, whose base is random, and a run of an older version, whose
checkpoints held the base, have it in `workdir`/base.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from vidgen.ckpt.checked_weights import save_checked_weights
from vidgen.ckpt.digests import array_digests
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.manager import CheckpointError
from vidgen.core import rng
from vidgen.core.tree import named_leaves
from vidgen.nn.variables import Constant
from vidgen.parallel import processes
from vidgen.train.base_files import BaseFiles
from vidgen.train.options import RunOptions
from vidgen.train.task import Task
from vidgen.train.weights_source import Weights, base_weights

__all__ = ["load_base", "save_base"]


def load_base(
    workdir: pathlib.Path,
    task: Task,
    run: RunOptions,
    abstract: nnx.State,
    *,
    claim: bool = False,
    dtype: Any = None,
) -> nnx.State:
    """The `Constant`s of a run's module; with several processes all of them must call this.

    Args:
      abstract: from `vidgen.train.state.abstract_base`; if it is empty, so is the result.
      claim: the run begins or resumes. When it begins, a base without a source is initialized and stored, and
        a source's weights are recorded.
      dtype: dtype of the result; None is that of `abstract`.

    Raises:
      CheckpointError: the source is missing, or its weights are not those that the run began with.
    """
    wanted = named_leaves(abstract)
    if not wanted:
        return abstract
    files = BaseFiles(workdir)
    stored = processes.all_agree(files.weights.exists())
    if claim and run.init_from is None and not stored:
        if any((workdir / "checkpoints").glob("[0-9]*")):
            raise CheckpointError(f"{files.weights} is missing: restore it from a copy")
        save_base(workdir, _initial(task, run.seed, abstract))
        stored = True
    found = base_weights(workdir, run, {name: _as(leaf, dtype) for name, leaf in wanted.items()})
    if not stored:
        _check(files, run, found, wanted, claim)
    return jax.tree.unflatten(jax.tree.structure(abstract), [found.arrays[name] for name in wanted])


def save_base(workdir: pathlib.Path, base: nnx.State) -> None:
    """Stores the base in `workdir`; with several processes all of them must call this."""
    path = BaseFiles(workdir).weights
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checked_weights(path, base)
    processes.sync("base of the run is there")


def _initial(task: Task, seed: int, abstract: nnx.State) -> nnx.State:
    """The random base that `vidgen.train.state.init_state` leaves out."""

    def initial(key: jax.Array) -> nnx.State:
        return nnx.state(task.build(nnx.Rngs(rng.stream(key, "params"))), Constant, graph=False)

    return jax.jit(initial, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(jax.random.key(seed))


def _check(files: BaseFiles, run: RunOptions, found: Weights, wanted: Mapping[str, Any], claim: bool) -> None:
    """Compares the weights with those that the run began with; records them if it begins."""
    digests = {}
    if found.exact:
        for name, array in found.arrays.items():
            digests |= array_digests({name: array.astype(wanted[name].dtype)})
    if not processes.all_agree(files.source.exists()):
        if claim and processes.is_main_process():
            write_json(files.source, {"step": found.step, "digests": digests})
        return
    recorded = files.record().digests
    changed = [name for name, digest in digests.items() if recorded.get(name, digest) != digest]
    if changed:
        raise CheckpointError(
            f"{files.workdir} trains a LoRA on other weights than those of run.init_from={run.init_from!r} "
            f"({len(changed)} arrays differ: {', '.join(changed[:3])}): {BaseFiles.REMEDY}"
        )


def _as(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)
