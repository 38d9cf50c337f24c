"""Checkpoints of a run: asynchronous, atomic, checked, for any mesh. Only `ckpt` knows Orbax."""

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

    A save is written in the background to a temporary name and renamed when it is complete: a folder that
    carries a step's number is whole. Saving again, `wait` and `close` wait for it. Each checkpoint has a
    manifest with digests of its arrays, which `restore` compares. A context manager.
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
        """Makes the directory where it is missing.

        Args:
          every: steps between saves, as `should_save` answers.
          keep: how many of the newest checkpoints stay.
          keep_every: checkpoints at multiples of this stay too; None keeps the newest only.
          cleanup: removes what killed saves left behind, and renames damaged checkpoints to `<step>.damaged`.
            For the one run that writes here, never for readers.

        Raises:
          CheckpointError: what Orbax reads first of each checkpoint is damaged in one of them.
        """
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self.directory = pathlib.Path(directory).absolute()
        # Any: the annotations of Orbax's policies do not fit its own protocols.
        decision: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(every)
        preservation: Any = policies.AnyPreservationPolicy(kept)
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
        """The step of the newest complete checkpoint."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether `step` is one of those that are saved on schedule."""
        return step % self._every == 0

    def save(self, step: int, state: PyTree, parts: Mapping[str, Any] | None = None) -> None:
        """Starts to save; returns as soon as the arrays may be overwritten. A step that is there stays.

        Args:
          state: a tree of arrays.
          parts: JSON-able values that belong to the same step, by name.

        Raises:
          CheckpointError: this save, or the one before, could not be written; the disk is full, say.
        """
        self.wait()
        if step in self.steps():
            return
        parts = dict(parts or {})
        manifest = Manifest.of({plain_name(name): leaf for name, leaf in named_leaves(state).items()}, parts)
        context = ocp.Context()
        # What lies on several devices is cut, for each of them to write a part, by a program per shape; for
        # less than this it takes longer to compile than to write.
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
        """The state of a checkpoint, and the JSON values asked for.

        Where the newest is damaged, the one before is taken, with a warning. Arrays of another type than the
        one asked for are cast, after their digests were compared. With several processes all of them must
        call this; they take the same step.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with the shardings that the arrays shall have.
          step: which; None is the newest that is whole.
          parts: names as given to `save`.
          partial: reads only the arrays that `abstract_state` has, and leaves the others alone.

        Raises:
          CheckpointError: no such checkpoint, none that is whole, or one of another model: the arrays that
            differ are named.
        """
        return self._newest_whole(
            step, lambda step: (step, *self._at(step).load(abstract_state, parts, partial=partial))
        )

    def shapes(self, step: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each saved array by dotted name; of the newest checkpoint where `step` is None.

        Raises:
          CheckpointError: no such checkpoint, or none that can be read.
        """
        stored = self._newest_whole(step, lambda step: self._at(step).stored())
        return {plain_name(name): array.shape for name, array in stored.items()}

    def restore_named(
        self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array]]:
        """The step, and those arrays of its checkpoint that are wanted, by the names that `shapes` gives.

        Args:
          wanted: modules' arrays; what an optimizer keeps, which is in tuples, cannot be had by name.
          step: which; None is the newest that is whole.

        Raises:
          CheckpointError: no such checkpoint, none that is whole, or arrays that are missing or of another
            shape.
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

        step, loaded = self._newest_whole(step, load)
        return step, {plain_name(name): array for name, array in named_leaves(loaded).items()}

    def wait(self) -> None:
        """Returns when the save that is under way is complete; SIGTERM and SIGINT take effect only then.

        Raises:
          CheckpointError: it could not be written; the disk is full, say. The checkpoints before are whole.
        """
        if self._saving is None:
            return
        step, response = self._saving
        # jax's own handler of SIGTERM stays where several processes agree on a step to stop after.
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
        """Waits as `wait` does, and ends the background threads."""
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
        """The error of a save that failed, whose half-written folder is removed to make room."""
        with contextlib.suppress(Exception):
            self._orbax.wait()  # An error of Orbax's threads is raised once in each thread that waits.
        if self._writes and processes.is_main_process():
            for folder in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
        whole = [s for s in self.steps() if s != step]
        before = (
            f"the newest whole checkpoint is that of step {whole[-1]}" if whole else "there is none before"
        )
        return CheckpointError(
            f"{self.directory / str(step)} could not be written ({in_one_line(error)}); {before}. Make room "
            "on the disk, or mend what is wrong with it, and run the same command again"
        )

    def _newest_whole(self, step: int | None, load: Callable[[int], _Result]) -> _Result:
        """What `load` gives of `step`, or of the newest step where it does not raise `Damaged`."""
        self.wait()
        reasons: dict[int, str] = {}
        for candidate in self._candidates(step):
            try:
                result = load(candidate)
            except Damaged as damaged:
                reasons[candidate] = str(damaged)
                continue
            if reasons:
                self._pass_over(reasons, candidate)
            return result
        listed = "; ".join(
            f"{self.directory / str(s)} is damaged ({reason})" for s, reason in reasons.items()
        )
        if step is not None:
            raise CheckpointError(f"{listed}: choose another of the steps {self.steps()}")
        raise CheckpointError(
            f"no checkpoint is whole: {listed}. Bring one back from a copy, or begin again in another workdir"
        )

    def _candidates(self, step: int | None) -> list[int]:
        """The steps to try, newest first; the same on every process."""
        # Process 0 decides: others may look at a shared folder a little later.
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

    def _pass_over(self, reasons: Mapping[int, str], step: int) -> None:
        """Says that damaged checkpoints are not used; the run that writes here moves them out of the way."""
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
                # When the run comes to that step again, its checkpoint must not be taken for this one.
                target = self.directory / f"{damaged}.damaged"
                shutil.rmtree(target, ignore_errors=True)
                (self.directory / str(damaged)).rename(target)
        processes.sync("damaged checkpoints were renamed")
        self._orbax.reload()
        names = ", ".join(f"{damaged}.damaged" for damaged in reasons)
        warn("going on from step %d, to repeat %s; what is damaged was renamed (%s)", step, steps, names)
