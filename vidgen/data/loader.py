"""Batches of clips: shuffled, endless, the same whatever the number of processes, and resumable exactly."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vidgen.core.logging import get_logger
from vidgen.data.source import BrokenClip, ClipSource

__all__ = ["Loader"]

_REPLACEMENTS = 64
"""How many other clips are tried in the place of a broken one before the source is given up."""


class Loader(Iterator[dict[str, Any]]):
    """Endless batches of a clip source, for one process of several.

    Position `q` of the endless sequence of clips depends on the source's length, the seed and `shuffle` only;
    step `k` is the positions `[k * B, (k + 1) * B)`, of which process `p` of `P` decodes `[k * B + p * B / P,
    ...)` alone. Every epoch has a shuffle of its own. Decoding runs ahead in threads, clip by clip; the state
    describes the batches that were handed out, never what was read ahead.

    A batch is a dict: `video` uint8 [b t h w 3], `caption` and `name` lists of b strings, and the
    source's other entries, arrays stacked over the batch and anything else as lists.

    Attributes:
      broken: the clips of this process that could not be decoded: their reason by name. Each is logged when
        it is first met, and replaced by another clip, the same one in every run.
      num_replaced: how often a broken clip was replaced.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
        prefetch: int = 4,
        shuffle: bool = True,
    ):
        """Starts nothing yet: threads start with the first batch.

        Args:
          source: the clips.
          batch_size: clips per step over all processes.
          seed: of the shuffle, and of what replaces a broken clip.
          process_index: which process this is.
          process_count: how many processes share a batch; must divide `batch_size`.
          num_threads: that decode; 0 decodes in the caller's thread.
          prefetch: how many batches are decoded ahead; 0 decodes on demand.
          shuffle: whether the order is shuffled, anew in every epoch.

        Raises:
          ValueError: the source is empty, or the numbers do not fit each other.
        """
        if len(source) == 0:
            raise ValueError(f"the source of clips is empty: {source!r}. Give it at least one readable clip.")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size is {batch_size}, which {process_count} processes cannot share equally: "
                f"make it a positive multiple of {process_count}."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
        self.broken: dict[str, str] = {}
        self.num_replaced = 0
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._rows_per_step = batch_size // process_count
        self._step = 0
        self._lock = threading.Lock()
        order = grain.MapDataset.range(len(source)).seed(seed)
        rows = _ProcessRows(
            (order.shuffle() if shuffle else order).repeat(),
            batch_size=batch_size,
            start=process_index * self._rows_per_step,
            count=self._rows_per_step,
        ).map(self._read)
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch * self._rows_per_step
        )
        self._rows = iter(rows.to_iter_dataset(options))

    def __next__(self) -> dict[str, Any]:
        batch = _collate([next(self._rows) for _ in range(self._rows_per_step)])
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the sequence stands: JSON-able, and equal on all processes.

        `next_index` counts clips over all processes, whose number may be another when the run goes on.
        """
        return {
            "next_index": self._step * self._batch_size,
            "num_clips": len(self._source),
            "seed": self._seed,
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `get_state` was taken: the next batch is the one that would have followed.

        Raises:
          ValueError: the state is of another seed, or falls inside a batch of this size.
        """
        if state["seed"] != self._seed:
            raise ValueError(
                f"the loader's state is of seed {state['seed']}, this loader has seed {self._seed}."
            )
        step, rest = divmod(state["next_index"], self._batch_size)
        if rest:
            raise ValueError(
                f"the loader's state stands after {state['next_index']} clips, not a whole number of "
                f"batches of {self._batch_size}: use the batch size of the run that saved it."
            )
        if state["num_clips"] != len(self._source):
            get_logger(__name__).warning(
                "the data had %d clips when this state was saved and has %d now: the order of clips differs",
                state["num_clips"],
                len(self._source),
            )
        self._step = step
        self._rows.set_state({"next_index": step * self._rows_per_step})

    def close(self) -> None:
        """Drops what was read ahead and ends the threads; the loader gives no batches after that."""
        self._rows.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, row: tuple[int, int]) -> dict[str, Any]:
        """The clip at a position of the sequence, or what stands in for it."""
        position, index = row
        rng = None
        for _ in range(1 + _REPLACEMENTS):
            try:
                return self._source[index]
            except BrokenClip as error:
                self._note_broken(error)
                rng = rng or np.random.default_rng((self._seed, position))
                index = int(rng.integers(len(self._source)))
        raise RuntimeError(
            f"{1 + _REPLACEMENTS} clips in a row could not be decoded; {len(self.broken)} broken so far, for "
            f"instance {dict(list(self.broken.items())[:3])}. Check the data: {self._source!r}."
        )

    def _note_broken(self, error: BrokenClip) -> None:
        with self._lock:
            self.num_replaced += 1
            known = error.name in self.broken
            self.broken[error.name] = error.reason
        if not known:
            get_logger(__name__).warning("broken clip replaced by another: %s: %s", error.name, error.reason)


class _ProcessRows(grain.MapDataset[tuple[int, int]]):
    """The part of an endless order of clips that one process decodes, as (position, index of the clip)."""

    def __init__(self, order: grain.MapDataset[int], *, batch_size: int, start: int, count: int):
        super().__init__(order)
        self._order = order
        self._batch_size = batch_size
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return len(self._order) // self._batch_size * self._count

    def __getitem__(self, index):
        step, row = divmod(index, self._count)
        position = step * self._batch_size + self._start + row
        return position, self._order[position]


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several clips."""
    return {key: _stack(key, rows) for key in rows[0]}


def _stack(key: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray | list[Any]:
    values = [row[key] for row in rows]
    if not isinstance(values[0], (np.ndarray, np.generic)):
        return values
    shapes = [value.shape for value in values]
    for row, shape in zip(rows, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"clips of one batch differ in the shape of {key!r}: {shapes[0]} in {rows[0]['name']}, "
                f"{shape} in {row['name']}. A source must give every clip the same shapes."
            )
    return np.stack(values)
