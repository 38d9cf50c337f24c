"""One checkpoint, read and verified against its manifest, with the same verdict on every process."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from vidgen.ckpt.manifest import Manifest, StoredArray
from vidgen.ckpt.orbax_errors import in_one_line, is_of_the_machine, without_noise
from vidgen.ckpt.orbax_json import check_checkpoint
from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.parallel import processes

__all__ = ["MANIFEST", "STATE", "Checkpoint", "CheckpointError", "Damaged", "plain_name"]

_log = get_logger(__name__)
STATE, MANIFEST = "state", "manifest"
_Result = TypeVar("_Result")


class CheckpointError(UserError):
    """A checkpoint cannot be used or written; the message says where, what is wrong and what to do."""


class Damaged(Exception):
    """A checkpoint differs from what was saved: raised on every process, with the difference in one line."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The checkpoint in a folder. With several processes all of them must call each method.

    Every method raises `Damaged` if the checkpoint differs from what was saved, and `CheckpointError` if it
    cannot be read for another reason.

    Attributes:
      where: the folder.
    """

    where: pathlib.Path

    def load(
        self, abstract_state: PyTree, parts: tuple[str, ...] = (), *, partial: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """State and JSON parts; see `CheckpointManager.restore`.

        Raises:
          CheckpointError: also for a checkpoint of another model.
        """
        where = self.where
        stored = self.stored()
        manifest = self._manifest()
        saved = {plain_name(name): array for name, array in stored.items()}
        if manifest is not None:
            recorded = {name: (array.shape, array.dtype) for name, array in manifest.arrays.items()}
            if recorded != {name: (array.shape, array.dtype) for name, array in saved.items()}:
                raise Damaged("the list of its arrays differs from the saved one")
        missing = [name for name in parts if not (where / name).is_dir()]
        if missing and (manifest is None or manifest.parts.keys() >= set(missing)):
            raise Damaged(f"it lacks {', '.join(missing)}")
        if missing:
            raise CheckpointError(
                f"{where} lacks {', '.join(missing)}: it is not a checkpoint of a training run"
            )
        self._check(abstract_state, saved, where, partial)
        # Digests cover the arrays in the saved dtypes: casts come last.
        as_saved = jax.tree.unflatten(
            jax.tree.structure(abstract_state),
            [_as_saved(leaf, saved[plain_name(name)]) for name, leaf in named_leaves(abstract_state).items()],
        )
        loaded = self._read({STATE: as_saved, **dict.fromkeys(parts)}, partial=partial)
        values = {name: loaded[name] for name in parts}
        if manifest is None:
            _log.info("%s is from before checkpoints had digests: its arrays are not verified", where)
        else:
            arrays = {plain_name(name): array for name, array in named_leaves(loaded[STATE]).items()}
            changed = manifest.changed(arrays, values)
            if not processes.all_agree(not changed):
                shown = ", ".join(changed[:3] + ["..."] * (len(changed) > 3)) or "found by another process"
                raise Damaged(f"{len(changed)} of {len(arrays)} arrays are not what was saved: {shown}")
        return jax.tree.map(_cast, loaded[STATE], abstract_state), values

    def stored(self) -> dict[str, StoredArray]:
        """Shapes and dtypes of the stored arrays, by Orbax's names.

        Raises:
          Damaged: the list of arrays cannot be read.
        """

        def read() -> dict[str, StoredArray]:
            check_checkpoint(self.where)
            with without_noise():
                metadata = ocp.checkpointables_metadata(str(self.where)).metadata.get(STATE)
            if metadata is None:
                raise ValueError("the list of its arrays cannot be read")
            return {
                name: StoredArray(tuple(leaf.shape), str(leaf.dtype), "")
                for name, leaf in named_leaves(metadata).items()
            }

        return self._agreed(read)

    def _manifest(self) -> Manifest | None:
        """The manifest; None for a checkpoint of an older version without one.

        Raises:
          Damaged: the manifest cannot be read, or differs from what was written.
        """
        if not processes.all_agree((self.where / MANIFEST).is_dir()):
            return None
        values = self._read({MANIFEST: None})[MANIFEST]
        return self._agreed(lambda: Manifest.from_json(values))

    def _read(self, wanted: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        # The context is made here, not at construction: it applies to this load only.
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        if jax.process_count() > 1:
            # Each process reads independently and they agree afterwards: none waits for one that failed.
            me = jax.process_index()
            context.multiprocessing.primary_host = me
            context.multiprocessing.active_processes = {me}
            context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"

        def read() -> dict[str, Any]:
            with context, without_noise():
                return ocp.load_checkpointables(str(self.where), wanted)

        return self._agreed(read)

    def _agreed(self, read: Callable[[], _Result]) -> _Result:
        """Result of `read`; raises on all processes if it fails on one.

        Raises:
          Damaged: the checkpoint is at fault.
          CheckpointError: the disk or its permissions are at fault.
        """
        try:
            result, failure = read(), None
        except Exception as error:
            result, failure = None, error
        agreed = processes.all_agree(failure is None)
        if failure is None:
            if not agreed:
                raise Damaged("another process could not read it")
            return result  # pyright: ignore[reportReturnType]
        if isinstance(failure, UserError):
            raise Damaged(str(failure)) from failure
        if isinstance(failure, MemoryError | jax.errors.JaxRuntimeError):
            raise failure
        if is_of_the_machine(failure):
            raise CheckpointError(f"{self.where} cannot be read: {in_one_line(failure)}") from failure
        raise Damaged(in_one_line(failure)) from failure

    def _check(
        self, abstract_state: PyTree, stored: Mapping[str, StoredArray], where: pathlib.Path, partial: bool
    ) -> None:
        saved = {name: array.shape for name, array in stored.items()}
        wanted = {
            plain_name(name): _stored_shape(leaf) for name, leaf in named_leaves(abstract_state).items()
        }
        problems = [f"{name}: missing in the checkpoint" for name in sorted(wanted.keys() - saved.keys())]
        unexpected = () if partial else sorted(saved.keys() - wanted.keys())
        problems += [f"{name}: only in the checkpoint" for name in unexpected]
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


def plain_name(name: str) -> str:
    """`name` without the suffix `.value`, which stored names of variables have."""
    return name.removesuffix(".value")


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _as_saved(leaf: Any, stored: StoredArray) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(stored.dtype), sharding=sharding)


def _cast(array: jax.Array, leaf: Any) -> jax.Array:
    return array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
