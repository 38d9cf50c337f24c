"""Rows of clips of any sizes: a fixed number of tokens each, filled first-fit."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from grain import experimental as grain_experimental

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.data.source import BrokenClip

__all__ = ["PackedLoader", "PackingOptions", "SizedClips", "plan_rows"]

_log = get_logger(__name__)

_MOST_BROKEN = 64
"""How many clips in a row may be broken before the source is given up."""

Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How rows are filled.

    Attributes:
      tokens_per_row: tokens of a row, padding included; no clip may be longer.
      clips_per_row: most clips of a row, each of which has room for a caption of its own.
      window: rows that are filled at a time. A clip goes to the first of them that has room, and when it
        finds none all of them are handed out: more rows leave less padding, and move clips further from their
        place in the order.
    """

    tokens_per_row: int
    clips_per_row: int = 16
    window: int = 64

    def __post_init__(self):
        for name in ("tokens_per_row", "clips_per_row", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")


@runtime_checkable
class SizedClips(Protocol):
    """Clips by index, of sizes that are known before any is read; as `ClipSource` otherwise."""

    @property
    def sizes(self) -> Sequence[Size]:
        """Frames, height and width of each clip's video."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def plan_rows(
    lengths: Sequence[int], options: PackingOptions, *, seed: int, num_epochs: int | None = None
) -> grain.IterDataset[list[int]]:
    """Which clips share a row, row by row: first-fit over the shuffled order of the clips.

    Nothing but lengths is looked at, so every process plans all rows, in less than a millisecond a clip. Each
    epoch has every clip once, in an order of its own; rows at its end hold clips of the next too.

    Args:
      lengths: tokens of each clip.
      seed: of the order.
      num_epochs: None is endless.

    Returns:
      Grain's data set of lists of indices.

    Raises:
      UserError: there is no clip, or one is longer than a row; the row that would do is named.
    """
    if not len(lengths):
        raise UserError("there are no clips to pack: give at least one")
    longest = int(np.argmax(lengths))
    if lengths[longest] > options.tokens_per_row:
        raise UserError(
            f"clip {longest} has {lengths[longest]} tokens, more than a row's tokens_per_row "
            f"{options.tokens_per_row}: set it to {lengths[longest]} or more"
        )
    order = grain.MapDataset.range(len(lengths)).seed(seed).shuffle().repeat(num_epochs)
    # What is packed is as long as the clip, and otherwise nothing.
    stubs = order.map(lambda index: {"tokens": np.zeros(lengths[index], np.int8), "clip": int(index)})
    rows = grain_experimental.FirstFitPackIterDataset(
        stubs.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": options.tokens_per_row},
        num_packing_bins=options.window,
        seed=seed,
        meta_features=("clip",),
        max_sequences_per_bin=options.clips_per_row,
    )
    return rows.map(lambda row: list(row["clip"]))


class PackedLoader(Iterator[dict[str, Any]]):
    """Endless batches of packed rows for one process of several, as `Loader` gives batches of one size.

    Which clips row `r` of step `k` holds depends on the clips' lengths, the seed and the options only;
    process `p` of `P` reads the clips of rows `[p * B / P, ...)` of each step alone. Reading runs ahead in
    threads; the state describes the batches that were handed out, never what was read ahead.

    A batch is a dict: `rows`, a list of this process' rows, each a list of clips as the source gives them;
    `tokens_per_row` and `clips_per_row`; `name`, the names of all these clips; and `num_frames`, the frames
    of the videos of the whole step, over all processes.

    Attributes:
      broken: the clips of this process that could not be read: their reason by name. Each is logged when it
        is first met, and left out: its tokens are padding then.
    """

    def __init__(
        self,
        source: SizedClips,
        lengths: Sequence[int],
        options: PackingOptions,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
        prefetch: int = 4,
    ):
        """Starts nothing yet: threads start with the first batch.

        Args:
          source: the clips.
          lengths: tokens of each clip.
          batch_size: rows per step over all processes.
          seed: of the order.
          process_index: which process this is.
          process_count: how many processes share a batch; must divide `batch_size`.
          num_threads: that read clips; 0 reads one after the other.
          prefetch: how many batches are read ahead; 0 reads on demand.

        Raises:
          UserError: the source is empty, a clip is longer than a row, or the numbers do not fit each other.
        """
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size is {batch_size} rows, which {process_count} processes cannot share equally: "
                f"make it a positive multiple of {process_count}."
            )
        if len(lengths) != len(source):
            raise UserError(
                f"there are {len(lengths)} lengths for {len(source)} clips; expected one for each"
            )
        self.broken: dict[str, str] = {}
        self._broken_in_a_row = 0
        self._source, self._options, self._seed = source, options, seed
        rows = batch_size // process_count
        self._mine = slice(process_index * rows, (process_index + 1) * rows)
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads) if num_threads else None
        steps = plan_rows(lengths, options, seed=seed).batch(batch_size, batch_fn=list).map(self._read)
        if prefetch:
            steps = grain_experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=prefetch)
        self._steps = iter(steps)

    def __next__(self) -> dict[str, Any]:
        return next(self._steps)

    @property
    def num_clips(self) -> int:
        """Clips of the source."""
        return len(self._source)

    def get_state(self) -> dict[str, Any]:
        """Where the sequence stands: JSON-able, and equal on all processes, whose number may change."""
        return {"plan": self._steps.get_state(), "num_clips": self.num_clips, "seed": self._seed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was taken: the next batch is the one that would have followed.

        Raises:
          UserError: the state is of another seed or number of clips.
        """
        for name, now in (("seed", self._seed), ("num_clips", self.num_clips)):
            if state.get(name) != now:
                raise UserError(
                    f"the state of the packed clips is of {name} {state.get(name)}, and it is {now} now: "
                    "other clips would share the rows. Use the clips and the seed of the run that saved it"
                )
        self._steps.set_state(dict(state["plan"]))

    def close(self) -> None:
        """Drops what was read ahead and ends the threads; the loader gives no batches after that."""
        self._steps.close()
        if self._pool:
            self._pool.shutdown()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: list[list[int]]) -> dict[str, Any]:
        """The batch of a step, of which the indices of all rows are given."""
        mine = step[self._mine]
        indices = [index for row in mine for index in row]
        found = iter((self._pool.map if self._pool else map)(self._clip, indices))
        rows = [[clip for clip in map(self._unbroken, (next(found) for _ in row)) if clip] for row in mine]
        return {
            "rows": rows,
            "tokens_per_row": self._options.tokens_per_row,
            "clips_per_row": self._options.clips_per_row,
            "name": [clip["name"] for row in rows for clip in row],
            "num_frames": sum(self._source.sizes[index][0] for row in step for index in row),
        }

    def _clip(self, index: int) -> dict[str, Any] | BrokenClip:
        try:
            return self._source[index]
        except BrokenClip as error:
            return error

    def _unbroken(self, clip: dict[str, Any] | BrokenClip) -> dict[str, Any] | None:
        if not isinstance(clip, BrokenClip):
            self._broken_in_a_row = 0
            return clip
        self._broken_in_a_row += 1
        if clip.name not in self.broken:
            _log.warning("broken clip left out: %s: %s", clip.name, clip.reason)
        self.broken[clip.name] = clip.reason
        if self._broken_in_a_row > _MOST_BROKEN:
            raise RuntimeError(
                f"{self._broken_in_a_row} clips in a row could not be read; {len(self.broken)} broken so "
                f"far, for instance {dict(list(self.broken.items())[:3])}. Check the data: {self._source!r}."
            )
        return None
