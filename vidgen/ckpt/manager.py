"""Checkpoints of a run: asynchronous, atomic, restorable onto another mesh. Only this module knows Orbax."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from vidgen.core.errors import UserError
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree

__all__ = ["CheckpointError", "CheckpointManager"]

_STATE = "state"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says where it is, what is wrong and what to do."""


class CheckpointManager:
    """The checkpoints below one directory, one folder per step.

    A save is written in the background to a temporary name and renamed when it is complete: a folder that
    carries a step's number is whole. Saving again, `wait` and `close` wait for it. A context manager.
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
          cleanup: removes what killed saves left behind. For the one run that writes here, never for readers.
        """
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self.directory = pathlib.Path(directory).absolute()
        # Any: the annotations of Orbax's policies do not fit its own protocols.
        decision: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(every)
        preservation: Any = policies.AnyPreservationPolicy(kept)
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=decision,
            preservation_policy=preservation,
            cleanup_tmp_directories=cleanup,
        )
        self._every = every

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
        """
        if step in self.steps():
            return
        context = ocp.Context()
        # What lies on several devices is cut, for each of them to write a part, by a program per shape; for
        # less than this it takes longer to compile than to write.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**22
        with context:
            self._orbax.save_checkpointables_async(step, {_STATE: state, **(parts or {})}, force=True)

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        parts: tuple[str, ...] = (),
        *,
        partial: bool = False,
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """The state of a checkpoint, and the JSON values asked for.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with the shardings that the arrays shall have.
          step: which; None is the newest.
          parts: names as given to `save`.
          partial: reads only the arrays that `abstract_state` has, and leaves the others alone.

        Raises:
          CheckpointError: no such checkpoint, or one of another model: the arrays that differ are named.
        """
        self.wait()
        step = self._existing(step)
        where = self.directory / str(step)
        missing = [name for name in (_STATE, *parts) if not (where / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{where} lacks {', '.join(missing)}: it is damaged, or no checkpoint of a training run"
            )
        self._check(abstract_state, step, where, partial)
        wanted = {_STATE: abstract_state, **dict.fromkeys(parts)}
        # The context is made here, not at construction: it holds for this load alone.
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with context:
            loaded = ocp.load_checkpointables(str(where), wanted)
        return step, loaded[_STATE], {name: loaded[name] for name in parts}

    def shapes(self, step: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each saved array by dotted name; of the newest checkpoint where `step` is None.

        Raises:
          CheckpointError: no such checkpoint.
        """
        self.wait()
        return {_plain(name): shape for name, shape in self._stored(self._existing(step)).items()}

    def restore_named(
        self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array]]:
        """The step, and those arrays of its checkpoint that are wanted, by the names that `shapes` gives.

        Args:
          wanted: modules' arrays; what an optimizer keeps, which is in tuples, cannot be had by name.
          step: which; None is the newest.

        Raises:
          CheckpointError: no such checkpoint, or arrays that are missing or of another shape.
        """
        self.wait()
        step = self._existing(step)
        stored = {_plain(name): name for name in self._stored(step)}
        tree: dict[str, Any] = {}
        for name, leaf in wanted.items():
            *parents, last = stored.get(name, name).split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
        step, loaded, _ = self.restore(tree, step, partial=True)
        return step, {_plain(name): array for name, array in named_leaves(loaded).items()}

    def wait(self) -> None:
        """Until the save that is under way is complete.

        Raises:
          Exception: whatever stopped the save.
        """
        self._orbax.wait()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._orbax.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"{self.directory} has no complete checkpoint: train first, or name another directory"
            )
        if step is None:
            return steps[-1]
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; there are {steps}")
        return step

    def _stored(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes by the names that Orbax uses."""
        metadata = self._orbax.checkpointables_metadata(step).metadata[_STATE]
        return {name: tuple(leaf.shape) for name, leaf in named_leaves(metadata).items()}

    def _check(self, abstract_state: PyTree, step: int, where: pathlib.Path, partial: bool) -> None:
        saved = {_plain(name): shape for name, shape in self._stored(step).items()}
        wanted = {_plain(name): _stored_shape(leaf) for name, leaf in named_leaves(abstract_state).items()}
        problems = [f"{name}: missing in the checkpoint" for name in sorted(wanted.keys() - saved.keys())]
        left_over = () if partial else sorted(saved.keys() - wanted.keys())
        problems += [f"{name}: only in the checkpoint" for name in left_over]
        problems += [
            f"{name}: shape {tuple(saved[name])} in the checkpoint, {wanted[name]} expected"
            for name in sorted(wanted.keys() & saved.keys())
            if tuple(saved[name]) != wanted[name]
        ]
        if problems:
            shown = "\n  ".join(problems[:20] + (["..."] if len(problems) > 20 else []))
            raise CheckpointError(
                f"{where} is of another model or optimizer ({len(problems)} arrays differ): "
                f"use the config that it was trained with\n  {shown}"
            )


def _plain(name: str) -> str:
    """Stored names end in `.value` where the tree's have a variable."""
    return name.removesuffix(".value")


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)
