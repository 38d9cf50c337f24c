"""Packed rows: clips of any sizes, packed first-fit into a fixed number of tokens per row."""

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
"""Consecutive broken clips skipped before an error is raised."""

Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """Options of packing.

    Attributes:
      tokens_per_row: tokens of a packed row, padding included; no clip may be longer.
      clips_per_row: most clips of a packed row, each with room for its own caption.
      window: packed rows open at a time. A clip goes to the first of them that has room; if none has, all of
        them are emitted. A larger window leaves less padding, and moves clips further from their place in the
        order.
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
    """A `ClipSource` whose clip sizes are known before any clip is read."""

    @property
    def sizes(self) -> Sequence[Size]:
        """Frames, height and width of each clip's video."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def plan_rows(
    lengths: Sequence[int], options: PackingOptions, *, seed: int, num_epochs: int | None = None
) -> grain.IterDataset[list[int]]:
    """Plans packed rows, each a list of clip indices: first-fit over the shuffled clips.

    The plan depends only on lengths, so every process plans all packed rows, in less than a millisecond per
    clip. Each epoch has every clip once, in its own order; packed rows at its end also hold clips of the
    next.

    Args:
      lengths: tokens of each clip.
      options: size of the packed rows, and the window.
      seed: seed of the order.
      num_epochs: number of epochs; None is endless.

    Returns:
      Grain dataset of lists of clip indices, one list per packed row.

    Raises:
      UserError: there are no clips, or a clip is longer than a packed row; the message names the length
        required.
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
    # Dummy payloads with the clip's length: Grain packs by length only.
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
    """Endless batches of packed rows for one process of several; `Loader` is for clips of equal size.

    The clips of packed row `r` of step `k` depend only on the clips' lengths, the seed and the options.
    Process `p` of `P` reads only the clips of the `B / P` packed rows from `p * B / P` on. Threads read
    ahead; the state covers the batches already returned, not those read ahead.

    A batch is a dict: `rows`, the packed rows of this process, each a list of clips as returned by the
    source; `tokens_per_row` and `clips_per_row`; `name`, the names of all these clips; and `num_frames`, the
    video frames of the step over all processes.

    Attributes:
      broken: clips that this process could not read, name -> reason. Each clip is logged once and left out:
        padding takes the place of its tokens.
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
        """Creates a loader; threads start with the first batch.

        Args:
          source: the clips.
          lengths: tokens of each clip.
          options: size of the packed rows, and the window.
          batch_size: packed rows per step over all processes.
          seed: seed of the order.
          process_index: index of this process.
          process_count: number of processes that share a batch; must divide `batch_size`.
          num_threads: threads that read clips; 0 reads clips sequentially.
          prefetch: batches read ahead; 0 reads on demand.

        Raises:
          UserError: the source is empty, a clip is longer than a packed row, the process index is out of
            range, the processes cannot share a batch equally, or clips and lengths differ in number.
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
        self._consecutive_broken = 0
        self._source, self._options, self._seed = source, options, seed
        local_rows = batch_size // process_count
        self._local_rows = slice(process_index * local_rows, (process_index + 1) * local_rows)
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads) if num_threads else None
        steps = plan_rows(lengths, options, seed=seed).batch(batch_size, batch_fn=list).map(self._read)
        if prefetch:
            steps = grain_experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=prefetch)
        self._steps = iter(steps)

    def __next__(self) -> dict[str, Any]:
        return next(self._steps)

    @property
    def num_clips(self) -> int:
        """Number of clips of the source."""
        return len(self._source)

    def get_state(self) -> dict[str, Any]:
        """Position in the sequence, JSON-able and equal on all processes; independent of their number."""
        return {"plan": self._steps.get_state(), "num_clips": self.num_clips, "seed": self._seed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state of `get_state`: the next batch is the one that would have followed.

        Raises:
          UserError: the state has another seed or number of clips.
        """
        for name, now in (("seed", self._seed), ("num_clips", self.num_clips)):
            if state.get(name) != now:
                raise UserError(
                    f"the state of the packed clips is of {name} {state.get(name)}, and it is {now} now: "
                    "rows would be packed differently. Use the clips and the seed of the run that saved it"
                )
        self._steps.set_state(dict(state["plan"]))

    def close(self) -> None:
        """Stops the threads and drops batches read ahead; the loader returns no batches afterwards."""
        self._steps.close()
        if self._pool:
            self._pool.shutdown()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: list[list[int]]) -> dict[str, Any]:
        """Batch of this process, from the clip indices of all packed rows of a step."""
        plan = step[self._local_rows]
        indices = [index for row in plan for index in row]
        found = iter((self._pool.map if self._pool else map)(self._clip, indices))
        rows = [[clip for clip in map(self._unbroken, (next(found) for _ in row)) if clip] for row in plan]
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
            self._consecutive_broken = 0
            return clip
        self._consecutive_broken += 1
        if clip.name not in self.broken:
            _log.warning("broken clip left out: %s: %s", clip.name, clip.reason)
        self.broken[clip.name] = clip.reason
        if self._consecutive_broken > _MOST_BROKEN:
            raise RuntimeError(
                f"{self._consecutive_broken} clips in a row could not be read; {len(self.broken)} broken so "
                f"far, for instance {dict(list(self.broken.items())[:3])}. Check the data: {self._source!r}."
            )
        return None
