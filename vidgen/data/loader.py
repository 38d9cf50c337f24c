"""Batches of clips: shuffled, endless, the same whatever the number of processes, and resumable exactly."""

import bisect
import dataclasses
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.data.buckets import Mixture, stage_starts, takes_part
from vidgen.data.source import BrokenClip, ClipSource

__all__ = ["Loader"]

_ENDLESS = 2**62
"""More steps than a run will have."""

_REPLACEMENTS = 64
"""How many other clips are tried in the place of a broken one before the source is given up."""


class Loader(Iterator[dict[str, Any]]):
    """Endless batches of a clip source, or of several by turns, for one process of several.

    Position `q` of the endless sequence of clips depends on the source's length, the seed and `shuffle` only;
    step `k` is the positions `[k * B, (k + 1) * B)`, of which process `p` of `P` decodes `[k * B + p * B / P,
    ...)` alone. Every epoch has a shuffle of its own. Decoding runs ahead in threads, clip by clip; the state
    describes the batches that were handed out, never what was read ahead.

    Of a `Mixture` each bucket has an endless sequence of its own, and each step takes the next batch of one
    bucket. Which one depends on the weights and the step alone: turns are spread as evenly as they can be.
    Where the buckets that take part change, a stage ends; each stage has orders of its own.

    A batch is a dict: `video` uint8 [b t h w 3], `caption` and `name` lists of b strings, and the
    source's other entries, arrays stacked over the batch and anything else as lists.

    Attributes:
      broken: the clips of this process that could not be decoded: their reason by name. Each is logged when
        it is first met, and replaced by another clip, the same one in every run.
      num_replaced: how often a broken clip was replaced.
    """

    def __init__(
        self,
        source: ClipSource | Mixture,
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
          batch_size: clips per step over all processes; of a mixture, for the buckets that have none.
          seed: of the shuffle, and of what replaces a broken clip.
          process_index: which process this is.
          process_count: how many processes share a batch; must divide the size of each.
          num_threads: that decode; 0 decodes in the caller's thread.
          prefetch: how many batches are decoded ahead; 0 decodes on demand.
          shuffle: whether the order is shuffled, anew in every epoch.

        Raises:
          UserError: the source is empty, or the numbers do not fit each other.
        """
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
        self.broken: dict[str, str] = {}
        self.num_replaced = 0
        self._parts = _parts(source, batch_size, seed, process_count, shuffle=shuffle)
        self._num_clips = len(source)
        self._turns = _BucketSchedule(self._parts)
        self._seed = seed
        self._positions_per_step = max(part.batch_size for part in self._parts)
        self._rows_per_step = self._positions_per_step // process_count
        self._step = 0
        self._lock = threading.Lock()
        rows = _ProcessRows(self._turns, self._rows_per_step, process_index).map(self._read)
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch * self._rows_per_step
        )
        # Empty rows, of steps with small batches, are left out.
        self._rows = iter(rows.to_iter_dataset(options))

    def __next__(self) -> dict[str, Any]:
        turn = self._turns[self._step]
        assert turn is not None  # as it would be of a filtered data set
        part, _ = turn
        batch = _collate([next(self._rows) for _ in range(part.rows)])
        self._step += 1
        return batch

    @property
    def num_clips(self) -> int:
        """Clips of the source; of a mixture, of all buckets."""
        return self._num_clips

    def get_state(self) -> dict[str, int]:
        """Where the sequence stands: JSON-able, and equal on all processes.

        `next_index` counts clips over all processes, whose number may be another when the run goes on; of a
        mixture it counts every step as one with the largest batch.
        """
        return {
            "next_index": self._step * self._positions_per_step,
            "num_clips": self.num_clips,
            "seed": self._seed,
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `get_state` was taken: the next batch is the one that would have followed.

        Raises:
          UserError: the state is of another seed, or falls inside a batch of this size.
        """
        if state["seed"] != self._seed:
            raise UserError(
                f"the loader's state is of seed {state['seed']}, this loader has seed {self._seed}."
            )
        step, rest = divmod(state["next_index"], self._positions_per_step)
        if rest:
            raise UserError(
                f"the loader's state stands after {state['next_index']} clips, not a whole number of "
                f"batches of {self._positions_per_step}: use the batch size of the run that saved it."
            )
        if state["num_clips"] != self.num_clips:
            get_logger(__name__).warning(
                "the data had %d clips when this state was saved and has %d now: the order of clips differs",
                state["num_clips"],
                self.num_clips,
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

    def _read(self, row: "_Row") -> dict[str, Any]:
        """The clip at a position of the sequence, or what stands in for it."""
        part, position, index = row
        rng = None
        for _ in range(1 + _REPLACEMENTS):
            try:
                return part.source[index]
            except BrokenClip as error:
                self._note_broken(error)
                rng = rng or np.random.default_rng((part.seed, position))
                index = int(rng.integers(len(part.source)))
        raise RuntimeError(
            f"{1 + _REPLACEMENTS} clips in a row could not be decoded; {len(self.broken)} broken so far, for "
            f"instance {dict(list(self.broken.items())[:3])}. Check the data: {part.source!r}."
        )

    def _note_broken(self, error: BrokenClip) -> None:
        with self._lock:
            self.num_replaced += 1
            known = error.name in self.broken
            self.broken[error.name] = error.reason
        if not known:
            get_logger(__name__).warning("broken clip replaced by another: %s: %s", error.name, error.reason)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Clips that make batches of their own.

    Attributes:
      stage: the step from which on it has turns.
      batch_size: over all processes; `rows` of them on each.
      seed: of its order; the first part has the loader's.
      order: the endless sequence of clips, by their indices.
    """

    source: ClipSource
    stage: int
    batch_size: int
    rows: int
    weight: float
    seed: int
    order: grain.MapDataset[int]

    def turn(self, number: int) -> "tuple[_Part, int]":
        """A step that this part gives the batch of, its `number`th."""
        return self, number


_Row = tuple[_Part, int, int]
"""What gives a clip, its position in the endless sequence of this part, and its index."""


def _parts(
    source: ClipSource | Mixture, batch_size: int, seed: int, processes: int, *, shuffle: bool
) -> list[_Part]:
    """What the batches are made of.

    Raises:
      UserError: a source is empty, or a batch cannot be shared by the processes.
    """
    if not isinstance(source, Mixture):
        return [_part(source, batch_size, seed, processes, shuffle=shuffle)]
    buckets = [bucket for bucket, _ in source.parts]
    numbered = [
        (stage, bucket, clips)
        for stage in stage_starts(buckets)
        for bucket, clips in source.parts
        if takes_part(bucket, stage)
    ]
    return [
        _part(
            clips,
            bucket.batch_size or batch_size,
            seed + number,
            processes,
            stage=stage,
            weight=bucket.weight,
            where=f"bucket {buckets.index(bucket)} ({bucket}): ",
            shuffle=shuffle,
        )
        for number, (stage, bucket, clips) in enumerate(numbered)
    ]


def _part(
    clips: ClipSource,
    size: int,
    seed: int,
    processes: int,
    *,
    shuffle: bool,
    stage: int = 0,
    weight: float = 1.0,
    where: str = "",
) -> _Part:
    if len(clips) == 0:
        raise UserError(
            f"{where}the source of clips is empty: {clips!r}. Give it at least one readable clip."
        )
    if size < 1 or size % processes:
        raise UserError(
            f"{where}batch_size is {size}, which {processes} processes cannot share equally: "
            f"make it a positive multiple of {processes}."
        )
    indices = grain.MapDataset.range(len(clips)).seed(seed)
    return _Part(
        source=clips,
        stage=stage,
        batch_size=size,
        rows=size // processes,
        weight=weight,
        seed=seed,
        order=(indices.shuffle() if shuffle else indices).repeat(),
    )


class _BucketSchedule(grain.MapDataset[tuple[_Part, int]]):
    """Step -> (bucket that supplies the batch, how many batches that bucket has supplied in the stage)."""

    def __init__(self, parts: Sequence[_Part]):
        stages = sorted({part.stage for part in parts})
        mixes = [self._mix([part for part in parts if part.stage == stage]) for stage in stages]
        super().__init__(mixes)
        self._stages, self._mixes = stages, mixes

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index):
        number = bisect.bisect_right(self._stages, index) - 1
        return self._mixes[number][index - self._stages[number]]

    @staticmethod
    def _mix(parts: Sequence[_Part]) -> grain.MapDataset[tuple[_Part, int]]:
        endless = [grain.MapDataset.range(_ENDLESS).map(part.turn) for part in parts]
        return grain.MapDataset.mix(endless, [part.weight for part in parts])


class _ProcessRows(grain.MapDataset[_Row]):
    """The clips that one process decodes: as many rows for each step as the largest batch, some empty."""

    def __init__(self, turns: grain.MapDataset[tuple[_Part, int]], rows_per_step: int, process_index: int):
        super().__init__(turns)
        self._turns = turns
        self._rows_per_step = rows_per_step
        self._process_index = process_index

    def __len__(self) -> int:
        return sys.maxsize // self._rows_per_step * self._rows_per_step

    def __getitem__(self, index):
        step, row = divmod(index, self._rows_per_step)
        part, turn = self._turns[step]
        if row >= part.rows:
            return None
        position = turn * part.batch_size + self._process_index * part.rows + row
        return part, position, part.order[position]


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
            raise UserError(
                f"clips of one batch differ in the shape of {key!r}: {shapes[0]} in {rows[0]['name']}, "
                f"{shape} in {row['name']}. A source must give every clip the same shapes."
            )
    return np.stack(values)
