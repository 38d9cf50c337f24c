"""Batches of clips: shuffled, endless, exactly resumable, and independent of the number of processes."""

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
"""More steps than any run takes."""

_REPLACEMENTS = 64
"""Replacements tried for a broken clip before an error is raised."""


class Loader(Iterator[dict[str, Any]]):
    """Endless batches of one clip source, or of the buckets of a mixture, for one process of several.

    Position `q` of the endless sequence of clips depends only on the source's length, the seed and `shuffle`.
    Step `k` covers positions `[k * B, (k + 1) * B)`; process `p` of `P` decodes only the `B / P` of them from
    `k * B + p * B / P` on. Every epoch has its own shuffle. Threads decode ahead, clip by clip; the state
    covers the batches already returned, not those decoded ahead.

    In a `Mixture`, each bucket has its own endless sequence, and each step takes the next batch of one
    bucket. The choice depends only on the weights and the step; batches of a bucket are spread as evenly as
    possible. A new stage begins where the set of active buckets changes; each stage has its own shuffles.

    A batch is a dict: `video` uint8 [b t h w 3], `caption` and `name` lists of b strings, and the source's
    extra entries: arrays stacked over the batch, anything else as lists.

    Attributes:
      broken: clips that this process could not decode, name -> reason. Each clip is logged once, and replaced
        by another clip, the same one in every run.
      num_replaced: number of times a broken clip was replaced.
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
        """Creates a loader; threads start with the first batch.

        Args:
          source: one clip source, or a mixture of buckets.
          batch_size: clips per step over all processes; in a mixture, for buckets without a `batch_size`.
          seed: seed of the shuffle, and of the choice of replacements for broken clips.
          process_index: index of this process.
          process_count: number of processes that share a batch; must divide every batch size.
          num_threads: decoding threads; 0 decodes in the caller's thread.
          prefetch: batches decoded ahead; 0 decodes on demand.
          shuffle: whether clips are shuffled, anew in every epoch.

        Raises:
          UserError: the source is empty, the process index is out of range, or the processes cannot share a
            batch equally.
        """
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
        self.broken: dict[str, str] = {}
        self.num_replaced = 0
        self._parts = _parts(source, batch_size, seed, process_count, shuffle=shuffle)
        self._num_clips = len(source)
        self._schedule = _BucketSchedule(self._parts)
        self._seed = seed
        self._positions_per_step = max(part.batch_size for part in self._parts)
        self._examples_per_step = self._positions_per_step // process_count
        self._step = 0
        self._lock = threading.Lock()
        examples = _ProcessExamples(self._schedule, self._examples_per_step, process_index).map(self._read)
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch * self._examples_per_step
        )
        # Grain skips None, the padding of steps with small batches.
        self._examples = iter(examples.to_iter_dataset(options))

    def __next__(self) -> dict[str, Any]:
        scheduled = self._schedule[self._step]
        assert scheduled is not None  # None would be a filtered element
        part, _ = scheduled
        batch = _collate([next(self._examples) for _ in range(part.local_batch_size)])
        self._step += 1
        return batch

    @property
    def num_clips(self) -> int:
        """Clips of the source; for a mixture, of all buckets."""
        return self._num_clips

    def get_state(self) -> dict[str, int]:
        """Position in the sequence, JSON-able and equal on all processes.

        `next_index` counts clips over all processes, so a run may resume with another number of processes.
        In a mixture it counts every step as one with the largest batch.
        """
        return {
            "next_index": self._step * self._positions_per_step,
            "num_clips": self.num_clips,
            "seed": self._seed,
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Restores a state of `get_state`: the next batch is the one that would have followed.

        Raises:
          UserError: the state has another seed, or falls inside a batch of this size.
        """
        if state["seed"] != self._seed:
            raise UserError(
                f"the loader's state has seed {state['seed']}, this loader has seed {self._seed}: use "
                "the seed of the run that saved it."
            )
        step, rest = divmod(state["next_index"], self._positions_per_step)
        if rest:
            raise UserError(
                f"the loader's state is after {state['next_index']} clips, not a whole number of "
                f"batches of {self._positions_per_step}: use the batch size of the run that saved it."
            )
        if state["num_clips"] != self.num_clips:
            get_logger(__name__).warning(
                "the data had %d clips when this state was saved and has %d now: the order of clips differs",
                state["num_clips"],
                self.num_clips,
            )
        self._step = step
        self._examples.set_state({"next_index": step * self._examples_per_step})

    def close(self) -> None:
        """Stops the threads and drops batches decoded ahead; the loader returns no batches afterwards."""
        self._examples.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, example: "_Example") -> dict[str, Any]:
        """Decodes an example; if its clip is broken, a replacement clip."""
        part, position, index = example
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
    """Clips that fill whole batches: one bucket within one stage, or the single source.

    Attributes:
      stage: first step of the stage.
      batch_size: clips per step over all processes.
      local_batch_size: clips per step on each process.
      seed: seed of the order; the first part has the loader's seed.
      order: endless sequence of clip indices.
    """

    source: ClipSource
    stage: int
    batch_size: int
    local_batch_size: int
    weight: float
    seed: int
    order: grain.MapDataset[int]

    def batch(self, number: int) -> "tuple[_Part, int]":
        """Returns (this part, number of its batch within the stage)."""
        return self, number


_Example = tuple[_Part, int, int]
"""Part that supplies the clip, position in that part's endless sequence, and index of the clip."""


def _parts(
    source: ClipSource | Mixture, batch_size: int, seed: int, processes: int, *, shuffle: bool
) -> list[_Part]:
    """Parts that supply the batches, in the order of their stages.

    Raises:
      UserError: a source is empty, or the processes cannot share a batch equally.
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
        local_batch_size=size // processes,
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
        endless = [grain.MapDataset.range(_ENDLESS).map(part.batch) for part in parts]
        return grain.MapDataset.mix(endless, [part.weight for part in parts])


class _ProcessExamples(grain.MapDataset[_Example]):
    """Examples decoded by one process; every step has as many as the largest batch, padded with None."""

    def __init__(
        self, schedule: grain.MapDataset[tuple[_Part, int]], examples_per_step: int, process_index: int
    ):
        super().__init__(schedule)
        self._schedule = schedule
        self._examples_per_step = examples_per_step
        self._process_index = process_index

    def __len__(self) -> int:
        return sys.maxsize // self._examples_per_step * self._examples_per_step

    def __getitem__(self, index):
        step, local = divmod(index, self._examples_per_step)
        part, batch = self._schedule[step]
        if local >= part.local_batch_size:
            return None
        position = batch * part.batch_size + self._process_index * part.local_batch_size + local
        return part, position, part.order[position]


def _collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks examples into a batch."""
    return {key: _stack(key, examples) for key in examples[0]}


def _stack(key: str, examples: Sequence[Mapping[str, Any]]) -> np.ndarray | list[Any]:
    values = [example[key] for example in examples]
    if not isinstance(values[0], (np.ndarray, np.generic)):
        return values
    shapes = [value.shape for value in values]
    for example, shape in zip(examples, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"clips of one batch differ in the shape of {key!r}: {shapes[0]} in {examples[0]['name']}, "
                f"{shape} in {example['name']}. A source must give every clip the same shapes."
            )
    return np.stack(values)
