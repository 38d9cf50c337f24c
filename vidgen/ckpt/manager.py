"""Checkpoints of a run: asynchronous, atomic, verified, for any mesh. Only `ckpt` uses Orbax."""

import contextlib
import pathlib
import shutil
import signal
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from vidgen.ckpt.checkpoint import MANIFEST, STATE, Checkpoint, CheckpointError, Damaged, plain_name
from vidgen.ckpt.manifest import Manifest
from vidgen.ckpt.orbax_errors import in_one_line, without_noise
from vidgen.ckpt.orbax_json import check_directory
from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.core.signals import deferred_signals
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.parallel import processes

__all__ = ["CheckpointError", "CheckpointManager"]

_log = get_logger(__name__)
_Result = TypeVar("_Result")


class CheckpointManager:
    """The checkpoints below one directory, one folder per step.

    A save is written in the background to a temporary name and renamed when complete, so a folder named after
    a step is always complete. The next save, `wait` and `close` wait for it. Each checkpoint has a manifest
    with digests of its arrays, which `restore` verifies. A context manager.
    """

    def __init__(
        self,
        directory: pathlib.Path | str,
        *,
        every: int = 1000,
        keep: int = 2,
        keep_every: int | None = None,
        cleanup: bool = False,
    ):
        """Creates the directory if it is missing.

        Args:
          every: steps between saves, for `should_save`.
          keep: number of newest checkpoints that stay.
          keep_every: checkpoints at multiples of this stay too; None keeps the newest only.
          cleanup: deletes leftovers of killed saves, and renames damaged checkpoints to `<step>.damaged`. For
            the one run that writes here, never for readers.

        Raises:
          CheckpointError: the metadata file that Orbax reads first is damaged in one of the checkpoints.
        """
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            preserved.append(policies.EveryNSteps(keep_every))
        self.directory = pathlib.Path(directory).absolute()
        # Any: the annotations of Orbax's policies do not match Orbax's protocols.
        decision: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(every)
        preservation: Any = policies.AnyPreservationPolicy(preserved)
        try:
            check_directory(self.directory)
        except UserError as error:
            raise CheckpointError(str(error)) from error
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=decision,
            preservation_policy=preservation,
            cleanup_tmp_directories=cleanup,
        )
        self._every, self._writes = every, cleanup
        self._saving: tuple[int, Any] | None = None

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether a save is scheduled after `step`."""
        return step % self._every == 0

    def save(self, step: int, state: PyTree, parts: Mapping[str, Any] | None = None) -> None:
        """Starts a save; returns once the arrays may be overwritten. An existing checkpoint stays as it is.

        Args:
          state: a pytree of arrays.
          parts: JSON-able values to save with the step, by name.

        Raises:
          CheckpointError: this save or the previous one could not be written, e.g. because the disk is full.
        """
        self.wait()
        if step in self.steps():
            return
        parts = dict(parts or {})
        manifest = Manifest.of({plain_name(name): leaf for name, leaf in named_leaves(state).items()}, parts)
        context = ocp.Context()
        # Orbax slices replicated arrays so that each device writes a part, with one program per shape. Below
        # this size compilation takes longer than writing.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**22
        saved = {STATE: state, MANIFEST: manifest.to_json(), **parts}
        try:
            with context, without_noise():
                self._saving = step, self._orbax.save_checkpointables_async(step, saved, force=True)
        except OSError as error:
            raise self._not_written(step, error) from error

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        parts: tuple[str, ...] = (),
        *,
        partial: bool = False,
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """Step, state and requested JSON values of a checkpoint.

        If the newest checkpoint is damaged, the previous one is restored, with a warning. Arrays are cast to
        the requested dtypes after their digests were compared. With several processes all of them must call
        this; they restore the same step.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with the shardings of the restored arrays.
          step: step to restore; None is the newest undamaged one.
          parts: names passed to `save`.
          partial: reads only the arrays in `abstract_state` and ignores the others.

        Raises:
          CheckpointError: no such checkpoint, all are damaged, or it is of another model; the message names
            the arrays that differ.
        """
        return self._newest_intact(
            step, lambda step: (step, *self._at(step).load(abstract_state, parts, partial=partial))
        )

    def shapes(self, step: int | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of each saved array by dotted name; of the newest checkpoint if `step` is None.

        Raises:
          CheckpointError: no such checkpoint, or none that can be read.
        """
        stored = self._newest_intact(step, lambda step: self._at(step).stored())
        return {plain_name(name): array.shape for name, array in stored.items()}

    def restore_named(
        self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array]]:
        """Step, and the `wanted` arrays of its checkpoint, by the names in `shapes`.

        Args:
          wanted: arrays of modules; optimizer state is stored in tuples and cannot be requested by name.
          step: step to restore; None is the newest undamaged one.

        Raises:
          CheckpointError: no such checkpoint, all are damaged, or arrays are missing or of another shape.
        """

        def load(step: int) -> tuple[int, PyTree]:
            stored = {plain_name(name): name for name in self._at(step).stored()}
            tree: dict[str, Any] = {}
            for name, leaf in wanted.items():
                *parents, last = stored.get(name, name).split(".")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaf
            return step, self._at(step).load(tree, partial=True)[0]

        step, loaded = self._newest_intact(step, load)
        return step, {plain_name(name): array for name, array in named_leaves(loaded).items()}

    def wait(self) -> None:
        """Waits until the current save is complete; defers SIGTERM and SIGINT until then.

        Raises:
          CheckpointError: the save could not be written, e.g. because the disk is full. Earlier checkpoints
            are intact.
        """
        if self._saving is None:
            return
        step, response = self._saving
        # With several processes JAX's SIGTERM handler stays: through it they agree on a step to stop after.
        several = jax.process_count() > 1
        numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        with deferred_signals(f"the checkpoint of step {step}", numbers), without_noise():
            try:
                response.result()
            except Exception as error:
                self._saving = None
                raise self._not_written(step, error) from error
            self._saving = None

    def close(self) -> None:
        """Waits for the current save like `wait`, then ends the background threads."""
        try:
            self.wait()
        finally:
            with without_noise():
                self._orbax.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, step: int) -> Checkpoint:
        return Checkpoint(self.directory / str(step))

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        """Error of a failed save; deletes its partial folder to free disk space."""
        with contextlib.suppress(Exception):
            self._orbax.wait()  # Orbax raises an error of its threads once per waiting thread.
        if self._writes and processes.is_main_process():
            for folder in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
        intact = [s for s in self.steps() if s != step]
        before = (
            f"the newest intact checkpoint is that of step {intact[-1]}"
            if intact
            else "there is no earlier one"
        )
        return CheckpointError(
            f"{self.directory / str(step)} could not be written ({in_one_line(error)}); {before}. Make room "
            "on the disk, or repair it, and run the same command again"
        )

    def _newest_intact(self, step: int | None, load: Callable[[int], _Result]) -> _Result:
        """Result of `load` for `step`, or for the newest step for which it does not raise `Damaged`."""
        self.wait()
        reasons: dict[int, str] = {}
        for candidate in self._candidates(step):
            try:
                result = load(candidate)
            except Damaged as damaged:
                reasons[candidate] = str(damaged)
                continue
            if reasons:
                self._skip_damaged(reasons, candidate)
            return result
        listed = "; ".join(
            f"{self.directory / str(s)} is damaged ({reason})" for s, reason in reasons.items()
        )
        if step is not None:
            raise CheckpointError(f"{listed}: choose another of the steps {self.steps()}")
        raise CheckpointError(
            f"no checkpoint is whole: {listed}. Restore one from a copy, or start again in another workdir"
        )

    def _candidates(self, step: int | None) -> list[int]:
        """Steps to try, newest first; equal on every process."""
        # Process 0 decides: on a shared file system the others may see an older listing.
        text = processes.broadcast_text(",".join(map(str, self.steps())))
        steps = [int(s) for s in text.split(",") if s]
        if not steps:
            raise CheckpointError(
                f"{self.directory} has no complete checkpoint: train first, or name another directory"
            )
        if step is None:
            return steps[::-1]
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; there are {steps}")
        return [step]

    def _skip_damaged(self, reasons: Mapping[int, str], step: int) -> None:
        """Warns about damaged checkpoints; the run that writes here also renames them."""
        main = processes.is_main_process()
        warn = _log.warning if main else _log.debug
        for damaged, reason in reasons.items():
            warn("%s is damaged: %s", self.directory / str(damaged), reason)
        lost = max(reasons) - step
        steps = "1 step" if lost == 1 else f"{lost} steps"
        if not self._writes:
            warn("the checkpoint of step %d is used instead, %s before", step, steps)
            return
        processes.sync("damaged checkpoints were read")
        if main:
            for damaged in reasons:
                # A later save of the same step must not find this folder.
                target = self.directory / f"{damaged}.damaged"
                shutil.rmtree(target, ignore_errors=True)
                (self.directory / str(damaged)).rename(target)
        processes.sync("damaged checkpoints were renamed")
        self._orbax.reload()
        names = ", ".join(f"{damaged}.damaged" for damaged in reasons)
        warn("going on from step %d, to repeat %s; damaged checkpoints were renamed (%s)", step, steps, names)
