"""Data options of an experiment: what tasks and commands ask of them, and the part that video data share."""

from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from vidgen.data.packing import PackingOptions
from vidgen.data.source import ClipSource

__all__ = ["TrainingData", "VideoData"]

D = TypeVar("D")


@runtime_checkable
class TrainingData(Protocol):
    """Options of the clips to train on.

    The size and the frame rate are those of previews, and of training clips if there are no buckets.
    """

    @property
    def num_frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def fps(self) -> float: ...

    @property
    def packing(self) -> PackingOptions | None:
        """How the packed rows of latents are filled; None if batches are videos of one size."""
        ...

    @property
    def clips(self) -> Any:
        """`VideoData` of the pixel clips that training uses, directly or encoded as latents."""
        ...


class VideoData:
    """Base of data options whose batches are videos; subclasses are frozen dataclasses."""

    packing: ClassVar[None] = None
    buckets: tuple[Any, ...] = ()

    @property
    def clips(self: D) -> D:
        return self

    def source(self) -> ClipSource:
        """Clips of the data's own size."""
        raise NotImplementedError

    def bucket_sources(self) -> tuple[ClipSource, ...]:
        """Clips of each of the `buckets`."""
        return ()

    def heldout(self) -> "VideoData":
        """Options of held-out clips; of the training clips if none are held out."""
        return self

    def heldout_scenes(self) -> Any:
        """`SpritesSource` of held-out clips, which knows what they show; None for other data."""
        return None
