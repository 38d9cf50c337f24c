"""`vidgen train --dry-run`: what would stop a run, found before it begins; nothing is written."""

import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from vidgen.cli.evaluators import evaluators
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import hub_remedy
from vidgen.core.tree import named_leaves
from vidgen.data.loader import Loader
from vidgen.train.experiment import Experiment
from vidgen.train.optimizer import partitioned
from vidgen.train.power_law import averaging
from vidgen.train.state import abstract_state
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import has_vae

__all__ = ["check_disk", "dry_run"]

_GIB = 2**30


def dry_run(
    experiment: Experiment,
    task: Any,
    workdir: pathlib.Path,
    mesh: Mesh,
    open_clips: Callable[[], Loader],
) -> None:
    """Reads the first batch and what the task does not train, shapes the model, and looks at the disk.

    Sizes and the config.json of `workdir` have been checked. Prints what the run would be.

    Args:
      task: the experiment's, which may read its VAE from elsewhere.
      open_clips: opens a loader of the training clips from the beginning.

    Raises:
      UserError, OSError: names what would stop the run.
    """
    run = experiment.run
    check_target(workdir / "config.json")
    if run.init_from is not None:
        _check_source(run.init_from)
    if isinstance(task, TextToVideoTask) and task.text_encoder is not None:
        task.text_encoder.prompts(mesh)
    task.frozen()
    with open_clips() as loader:
        batch = next(iter(loader))
    evaluators(experiment, mesh=mesh)
    rule = averaging(partitioned(experiment.optimizer, task.param_groups, run.num_steps), run.power_law)
    state, _ = abstract_state(task, rule, mesh)
    sizes = [math.prod(leaf.shape) for leaf in named_leaves(state.params).values()]
    arrays = named_leaves(state).values()
    # Of a key array, whose type is none of NumPy's, the size does not matter.
    saved = sum(math.prod(a.shape) * getattr(a.dtype, "itemsize", 8) for a in arrays)
    free = check_disk(workdir, saved * (run.keep + 1))
    print(f"model: {sum(sizes):,} parameters; mesh {dict(mesh.shape)}")
    print(f"first batch: {len(batch['name'])} clips, {batch['name'][0]} the first")
    print(f"a checkpoint: {saved / _GIB:.2f} GiB, {run.keep} are kept; {free / _GIB:.1f} GiB are free")
    print(f"nothing stands against {run.num_steps} steps in {workdir}; nothing was written")


def _check_source(path: str) -> None:
    """Refuses an `init_from` that is not there; whether its arrays fit is found when they are read."""
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
    """Free bytes where `workdir` is or would be.

    Raises:
      UserError: fewer than the `needed` ones.
    """
    place = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{workdir}: {free / _GIB:.1f} GiB are free, but checkpoints, kept and being written, "
            f"take {needed / _GIB:.1f} GiB: free some, give another --workdir or lower config.run.keep"
        )
    return free
