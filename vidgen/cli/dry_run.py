"""`vidgen train --dry-run`: finds errors that would stop a run before it begins; writes nothing."""

import math
import pathlib
import shutil
from collections.abc import Callable

from jax.sharding import Mesh

from vidgen.cli.evaluators import evaluators
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import hub_remedy
from vidgen.core.tree import named_leaves
from vidgen.data.loader import Loader
from vidgen.train.experiment import Experiment
from vidgen.train.phases import transformation
from vidgen.train.power_law import averaging
from vidgen.train.state import abstract_state
from vidgen.train.task import ExperimentTask
from vidgen.train.vae_folder import has_vae

__all__ = ["check_disk", "dry_run"]

_GIB = 2**30


def dry_run(
    experiment: Experiment,
    task: ExperimentTask,
    workdir: pathlib.Path,
    mesh: Mesh,
    open_clips: Callable[[], Loader],
) -> None:
    """Reads the first batch and the frozen modules, traces the model's shapes and checks the disk.

    The caller has checked sizes and `workdir`'s config.json. Prints a summary of the run.

    Args:
      task: the experiment's task, with the path of the VAE that the run would use.
      open_clips: opens a loader at the first training clip.

    Raises:
      UserError, OSError: names the error that would stop the run.
    """
    run = experiment.run
    check_target(workdir / "config.json")
    if run.init_from is not None:
        _check_source(run.init_from)
    if task.text_encoder is not None:
        task.text_encoder.prompts(mesh)
    for frozen in task.frozen().values():
        frozen.load()
    with open_clips() as loader:
        batch = next(iter(loader))
    evaluators(experiment, mesh=mesh)
    rule = averaging(transformation(task.phases, experiment.optimizer, run.num_steps), run.power_law)
    state, _ = abstract_state(task, rule, mesh)
    sizes = [math.prod(leaf.shape) for leaf in named_leaves(state.params).values()]
    arrays = named_leaves(state).values()
    # A key array's dtype is no NumPy dtype and has no itemsize; its size does not matter.
    saved = sum(math.prod(a.shape) * getattr(a.dtype, "itemsize", 8) for a in arrays)
    free = check_disk(workdir, saved * (run.keep + 1))
    print(f"model: {sum(sizes):,} parameters; mesh {dict(mesh.shape)}")
    print(f"first batch: {len(batch['name'])} clips, {batch['name'][0]} the first")
    print(f"a checkpoint: {saved / _GIB:.2f} GiB, {run.keep} are kept; {free / _GIB:.1f} GiB are free")
    print(f"nothing stands against {run.num_steps} steps in {workdir}; nothing was written")


def _check_source(path: str) -> None:
    """Raises UserError for a missing `init_from`; its arrays are checked only when they are read."""
    folder = pathlib.Path(path)
    transformers = (folder / "config.json", folder / "transformer" / "config.json")
    if not (
        (folder / "checkpoints").is_dir() or has_vae(folder) or any(file.exists() for file in transformers)
    ):
        raise UserError(
            f"config.run.init_from: {path} is not the workdir of a training run, a VAE, or Wan's weights"
            f"{hub_remedy(path)}"
        )


def check_disk(workdir: pathlib.Path, needed: int) -> int:
    """Free bytes on the disk of `workdir`, which need not exist.

    Raises:
      UserError: fewer than `needed` bytes are free.
    """
    existing = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{workdir}: {free / _GIB:.1f} GiB are free, but checkpoints, stored and being written, "
            f"take {needed / _GIB:.1f} GiB: free some, give another --workdir or lower config.run.keep"
        )
    return free
