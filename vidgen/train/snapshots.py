"""Snapshots of power-law averages, and weights of other averaging widths computed from them."""

import dataclasses
import pathlib
from typing import Annotated

import jax
import jax.numpy as jnp

from vidgen.ckpt.checked_weights import save_checked_weights, verify_weights
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.tensor_files import is_plain_name
from vidgen.ckpt.weights import load_weights
from vidgen.core import limits
from vidgen.core.config import resolve
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.core.typing import PyTree
from vidgen.parallel import processes
from vidgen.train.power_law import Averaged, PowerLaw, exponent, solve_weights

__all__ = ["SnapshotError", "averaged_weights", "save_snapshots"]

_FOLDER = "averages"


class SnapshotError(UserError):
    """Snapshots are missing or invalid; the message says where, and what to do."""


def save_snapshots(workdir: pathlib.Path | str, step: int, opt_state: Averaged, options: PowerLaw) -> None:
    """Writes each average to a file in `workdir`/averages, and last the JSON that lists them.

    With several processes all of them must call this; process 0 writes.
    """
    folder = pathlib.Path(workdir) / _FOLDER
    listed = []
    for number, (sigma_rel, average) in enumerate(zip(options.sigma_rels, opt_state.averages, strict=True)):
        name = f"step_{step:07d}_{number}.safetensors"
        save_checked_weights(folder / name, average)
        listed.append({"file": name, "sigma_rel": sigma_rel})
    about = {"step": step, "updates": int(opt_state.count), "averages": listed}
    if processes.is_main_process():
        write_json(folder / f"step_{step:07d}.json", about)


def averaged_weights(
    workdir: pathlib.Path | str, abstract_params: PyTree, sigma_rel: float, step: int | None = None
) -> tuple[int, PyTree]:
    """Weights of a run averaged with width `sigma_rel`, at the step of one of its snapshots.

    They are the weighted sum of all averages up to that step whose profile is nearest in least squares.

    Args:
      abstract_params: parameters of the run's model, with the shardings of the result.
      sigma_rel: width of the average, relative to the training until then.
      step: step of a snapshot; None is the newest.

    Returns:
      The step, the parameters.

    Raises:
      SnapshotError: there are no snapshots, or none of that step.
      WeightsError: a snapshot differs from what was written.
      UserError: no average has this width.
    """
    folder = pathlib.Path(workdir) / _FOLDER
    power = exponent(sigma_rel)
    snapshots = {about.step: about for about in map(_read, sorted(folder.glob("step_*.json")))}
    if not snapshots:
        raise SnapshotError(f"{folder} holds no snapshots: train with run.power_law")
    end = max(snapshots) if step is None else step
    if end not in snapshots:
        raise SnapshotError(f"{folder} has no snapshot of step {end}; there are {sorted(snapshots)}")
    files, profiles = [], []
    for about in (snapshots[s] for s in sorted(snapshots) if s <= end):
        for average in about.averages:
            files.append(folder / average.file)
            profiles.append((about.updates, exponent(average.sigma_rel)))
    if not files:
        raise SnapshotError(f"{folder}: the snapshots up to step {end} list no averages")
    shares = solve_weights(profiles, (snapshots[end].updates, power))
    total = None
    for file, share in zip(files, shares, strict=True):
        average = load_weights(file, abstract_params)
        verify_weights(
            file, average, remedy="Remove it and the JSON of its step, or bring it back from a copy"
        )
        part = jax.tree.map(lambda x, share=share: jnp.float32(share) * x, average)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return end, total


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Average:
    file: str
    sigma_rel: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """The JSON of one snapshot."""

    step: Annotated[int, limits.STEPS]
    updates: Annotated[int, limits.STEPS]
    averages: tuple[_Average, ...]


def _read(path: pathlib.Path) -> _Snapshot:
    """Snapshot described by a JSON file. Raises UserError, naming the file."""
    about: _Snapshot = resolve(_Snapshot, read_json(path, remedy="remove this snapshot"), where=str(path))
    for average in about.averages:
        if not is_plain_name(average.file):
            raise SnapshotError(
                f"{path}: found an average in {average.file[:200]!r}, expected a file of the same folder: "
                "remove this snapshot"
            )
        try:
            exponent(average.sigma_rel)
        except UserError as error:
            raise SnapshotError(f"{path}: {error}: remove this snapshot") from error
    return about
