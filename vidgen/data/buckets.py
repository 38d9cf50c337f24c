"""Training on clips of several sizes at once: images and videos, short and long, high and wide.

A bucket is a size, with a share of the training steps. Every step takes its whole batch from one bucket, so
that each size is compiled once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.data.source import ClipSource

__all__ = [
    "Bucket",
    "BucketedData",
    "Mixture",
    "fitting_sizes",
    "stage_starts",
    "takes_part",
    "training_clips",
    "training_sizes",
    "with_size",
]

D = TypeVar("D")

_CROPPED_ALIKE = 0.05
"""Sizes that keep as much of a picture as the best one, but for this share, are as good in shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips of one size.

    Attributes:
      num_frames: frames; 1 is for images.
      height: pixels.
      width: pixels.
      batch_size: clips per step over all devices and processes; None is `run.batch_size`.
      weight: share of the steps, relative to that of the other buckets.
      first_step, last_step: the steps, counted from 0, among which it has its share; None is to the end. So
        one run goes from images and small, short clips to larger and longer ones.

    Raises:
      UserError: a number is not possible.
    """

    num_frames: Annotated[int, limits.NUM_FRAMES] = 1
    height: Annotated[int, limits.SIDE]
    width: Annotated[int, limits.SIDE]
    batch_size: Annotated[int, limits.BATCH_SIZE] | None = None
    weight: Annotated[float, limits.POSITIVE] = 1.0
    first_step: Annotated[int, limits.STEP] = 0
    last_step: Annotated[int, limits.STEP] | None = None

    def __post_init__(self):
        limits.check_fields(self, f"bucket {self}")
        if self.first_step < 0 or (self.last_step is not None and self.last_step < self.first_step):
            raise UserError(
                f"bucket {self}: first_step is {self.first_step} and last_step {self.last_step}; expected "
                "0 or more, and not the first after the last"
            )

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.height} x {self.width}"


def stage_starts(buckets: Sequence[Bucket]) -> tuple[int, ...]:
    """The steps at which the buckets that take part change, the first of them 0.

    Raises:
      UserError: there is a step without any.
    """
    starts = {0} | {bucket.first_step for bucket in buckets}
    starts |= {bucket.last_step + 1 for bucket in buckets if bucket.last_step is not None}
    for start in sorted(starts):
        if not any(takes_part(bucket, start) for bucket in buckets):
            raise UserError(f"no bucket takes part in step {start}: change first_step or last_step of one")
    return tuple(sorted(starts))


def takes_part(bucket: Bucket, step: int) -> bool:
    """Whether batches of the bucket may be those of `step`."""
    return bucket.first_step <= step and (bucket.last_step is None or step <= bucket.last_step)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a `Loader` draws from, bucket by bucket.

    Attributes:
      parts: each bucket, with its clips.
    """

    parts: tuple[tuple[Bucket, ClipSource], ...]

    def __len__(self) -> int:
        """Clips of all buckets."""
        return sum(len(source) for _, source in self.parts)


@runtime_checkable
class BucketedData(Protocol):
    """Options of data that may have buckets."""

    @property
    def num_frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    def source(self) -> ClipSource:
        """Clips of `num_frames`, `height` and `width`."""
        ...

    def bucket_sources(self) -> tuple[ClipSource, ...]:
        """Clips of each bucket.

        Raises:
          UserError: there is none for a bucket, which the message names.
        """
        ...


def training_clips(data: BucketedData) -> ClipSource | Mixture:
    """What training draws from: the clips of the buckets, or those of the one size where there are none."""
    if not data.buckets:
        return data.source()
    return Mixture(tuple(zip(data.buckets, data.bucket_sources(), strict=True)))


def training_sizes(data: BucketedData, batch_size: int) -> tuple[Bucket, ...]:
    """The sizes of training's batches: the buckets, or the one size of the data.

    Args:
      batch_size: of those that have none of their own.
    """
    alone = Bucket(num_frames=data.num_frames, height=data.height, width=data.width)
    return tuple(
        dataclasses.replace(bucket, batch_size=bucket.batch_size or batch_size)
        for bucket in data.buckets or (alone,)
    )


def with_size(data: D, bucket: Bucket) -> D:
    """Options of data, a dataclass, for clips of the size of one bucket alone."""
    options: Any = data
    size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
    return dataclasses.replace(options, buckets=(), **size)


def fitting_sizes(
    shown: tuple[float | int, float | int], sizes: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Which sizes a picture is good for: those nearest in shape for which it need not be enlarged.

    Nearest in shape are the sizes that keep most of it when it is cropped, give or take 5 %. Where each of
    these would enlarge it, the one that enlarges it least is taken.

    Args:
      shown: height and width of the picture, in square pixels.
      sizes: heights and widths, at least one.

    Returns:
      Their indices, in order; at least one.
    """
    aspect = shown[1] / shown[0]
    ratios = [width / height / aspect for height, width in sizes]
    kept = [min(ratio, 1 / ratio) for ratio in ratios]
    near = [index for index, share in enumerate(kept) if share >= max(kept) - _CROPPED_ALIKE]
    scales = {index: max(sizes[index][0] / shown[0], sizes[index][1] / shown[1]) for index in near}
    limit = max(1.0, min(scales.values()))
    return tuple(index for index in near if scales[index] <= limit)
