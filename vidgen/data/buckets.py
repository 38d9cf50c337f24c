"""Training on clips of several sizes: images and videos, short and long, tall and wide.

A bucket is a clip size with a share of the training steps. Every step takes its whole batch from one bucket,
so that each size is compiled once.
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
"""Sizes count as nearest in shape if cropping keeps the best size's share of a picture, less at most
this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """A clip size with its share of the training steps.

    Attributes:
      num_frames: frames; 1 is for images.
      height: pixels.
      width: pixels.
      batch_size: clips per step over all devices and processes; None uses `run.batch_size`.
      weight: share of the steps, relative to the other buckets.
      first_step, last_step: first and last step, counted from 0, at which the bucket is active; None has no
        end. One run can go from images and small, short clips to larger and longer ones.

    Raises:
      UserError: a number is out of range.
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
                "0 <= first_step <= last_step"
            )

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.height} x {self.width}"


def stage_starts(buckets: Sequence[Bucket]) -> tuple[int, ...]:
    """Steps at which the set of active buckets changes; the first is 0.

    Raises:
      UserError: no bucket is active at some step.
    """
    starts = {0} | {bucket.first_step for bucket in buckets}
    starts |= {bucket.last_step + 1 for bucket in buckets if bucket.last_step is not None}
    for start in sorted(starts):
        if not any(takes_part(bucket, start) for bucket in buckets):
            raise UserError(f"no bucket takes part in step {start}: change first_step or last_step of one")
    return tuple(sorted(starts))


def takes_part(bucket: Bucket, step: int) -> bool:
    """Whether the bucket is active at `step`."""
    return bucket.first_step <= step and (bucket.last_step is None or step <= bucket.last_step)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Clips of several buckets, as input of `Loader`.

    Attributes:
      parts: (bucket, its clips) for each bucket.
    """

    parts: tuple[tuple[Bucket, ClipSource], ...]

    def __len__(self) -> int:
        """Number of clips over all buckets."""
        return sum(len(source) for _, source in self.parts)


@runtime_checkable
class BucketedData(Protocol):
    """Data options that may have buckets."""

    @property
    def num_frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    def source(self) -> ClipSource:
        """Clips of size `num_frames` x `height` x `width`."""
        ...

    def bucket_sources(self) -> tuple[ClipSource, ...]:
        """Clips of each bucket.

        Raises:
          UserError: a bucket has no clips; the message names the bucket.
        """
        ...


def training_clips(data: BucketedData) -> ClipSource | Mixture:
    """Clips for training: a mixture of the buckets, or the source of one size if there are none."""
    if not data.buckets:
        return data.source()
    return Mixture(tuple(zip(data.buckets, data.bucket_sources(), strict=True)))


def training_sizes(data: BucketedData, batch_size: int) -> tuple[Bucket, ...]:
    """Sizes of the training batches: the buckets, or the one size of the data.

    Args:
      data: data options.
      batch_size: for buckets without a `batch_size`.
    """
    single = Bucket(num_frames=data.num_frames, height=data.height, width=data.width)
    return tuple(
        dataclasses.replace(bucket, batch_size=bucket.batch_size or batch_size)
        for bucket in data.buckets or (single,)
    )


def with_size(data: D, bucket: Bucket) -> D:
    """Copy of data options (a dataclass) with the clip size of one bucket and without buckets."""
    options: Any = data
    size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
    return dataclasses.replace(options, buckets=(), **size)


def fitting_sizes(
    shown: tuple[float | int, float | int], sizes: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Sizes that suit a picture: nearest in shape, and not larger than the picture where possible.

    Nearest in shape are the sizes that keep most of the picture after cropping, give or take 5 %. If all of
    these would enlarge it, the one that enlarges it least is chosen.

    Args:
      shown: height and width of the displayed picture, in square pixels.
      sizes: heights and widths, at least one.

    Returns:
      Indices into `sizes`, ascending; at least one.
    """
    aspect = shown[1] / shown[0]
    ratios = [width / height / aspect for height, width in sizes]
    shares = [min(ratio, 1 / ratio) for ratio in ratios]
    near = [index for index, share in enumerate(shares) if share >= max(shares) - _CROPPED_ALIKE]
    scales = {index: max(sizes[index][0] / shown[0], sizes[index][1] / shown[1]) for index in near}
    limit = max(1.0, min(scales.values()))
    return tuple(index for index in near if scales[index] <= limit)
