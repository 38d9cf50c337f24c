"""One checkpoint, read and compared with its manifest: the same verdict on every process."""

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
    """A checkpoint that cannot be used or written; the message says where, what is wrong and what to do."""


class Damaged(Exception):
    """A checkpoint is not as it was saved; says how, in one line, on every process."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The checkpoint in a folder. With several processes all of them must call each method.

    Every method raises `Damaged` where the checkpoint is not as it was saved, and `CheckpointError` where it
    cannot be read for another reason.
    """

    where: pathlib.Path

    def load(
        self, abstract_state: PyTree, parts: tuple[str, ...] = (), *, partial: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state and the JSON parts; see `CheckpointManager.restore`.

        Raises:
          CheckpointError: it is of another model, too.
        """
        where = self.where
        stored = self.stored()
        manifest = self._manifest()
        saved = {plain_name(name): array for name, array in stored.items()}
        if manifest is not None:
            there = {name: (array.shape, array.dtype) for name, array in manifest.arrays.items()}
            if there != {name: (array.shape, array.dtype) for name, array in saved.items()}:
                raise Damaged("the list of its arrays is not the one that was saved")
        missing = [name for name in parts if not (where / name).is_dir()]
        if missing and (manifest is None or manifest.parts.keys() >= set(missing)):
            raise Damaged(f"it lacks {', '.join(missing)}")
        if missing:
            raise CheckpointError(
                f"{where} lacks {', '.join(missing)}: it is no checkpoint of a training run"
            )
        self._check(abstract_state, saved, where, partial)
        # Digests are of the arrays as they were saved: casts come last.
        as_saved = jax.tree.unflatten(
            jax.tree.structure(abstract_state),
            [_as_saved(leaf, saved[plain_name(name)]) for name, leaf in named_leaves(abstract_state).items()],
        )
        loaded = self._read({STATE: as_saved, **dict.fromkeys(parts)}, partial=partial)
        values = {name: loaded[name] for name in parts}
        if manifest is None:
            _log.info("%s is from before checkpoints had digests: its arrays are not checked", where)
        else:
            arrays = {plain_name(name): array for name, array in named_leaves(loaded[STATE]).items()}
            changed = manifest.changed(arrays, values)
            if not processes.all_agree(not changed):
                shown = ", ".join(changed[:3] + ["..."] * (len(changed) > 3)) or "seen by another process"
                raise Damaged(f"{len(changed)} of {len(arrays)} arrays are not what was saved: {shown}")
        return jax.tree.map(_cast, loaded[STATE], abstract_state), values

    def stored(self) -> dict[str, StoredArray]:
        """What Orbax says of the arrays, by the names that it uses.

        Raises:
          Damaged: it cannot be read.
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

        return self._whole(read)

    def _manifest(self) -> Manifest | None:
        """None for a checkpoint of a version that wrote none.

        Raises:
          Damaged: it cannot be read, or is not as it was written.
        """
        if not processes.all_agree((self.where / MANIFEST).is_dir()):
            return None
        values = self._read({MANIFEST: None})[MANIFEST]
        return self._whole(lambda: Manifest.from_json(values))

    def _read(self, wanted: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        # The context is made here, not at construction: it holds for this load alone.
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        if jax.process_count() > 1:
            # Each process reads by itself, and then they agree: where one of them fails, none waits for it.
            me = jax.process_index()
            context.multiprocessing.primary_host = me
            context.multiprocessing.active_processes = {me}
            context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"

        def read() -> dict[str, Any]:
            with context, without_noise():
                return ocp.load_checkpointables(str(self.where), wanted)

        return self._whole(read)

    def _whole(self, read: Callable[[], _Result]) -> _Result:
        """What `read` gives; all processes raise where it fails on one.

        Raises:
          Damaged: the checkpoint is at fault.
          CheckpointError: the disk or the rights to it are.
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


def plain_name(name: str) -> str:
    """Stored names end in `.value` where the tree's have a variable."""
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
