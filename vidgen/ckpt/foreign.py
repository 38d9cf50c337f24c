"""How a tensor in a checkpoint of another program relates to one of ours."""

import dataclasses

import numpy as np

__all__ = ["Foreign"]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Name and layout of a tensor.

    Attributes:
      name: in the checkpoint.
      axes: which of our axes each of its axes is, None for one of length 1 that we lack. Axes of ours that
        are not listed have length 1. In PyTorch a linear map's are (1, 0), a 3D filter's (4, 3, 0, 1, 2).
    """

    name: str
    axes: tuple[int | None, ...]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, where ours has the shape `ours`."""
        return tuple(1 if axis is None else ours[axis] for axis in self.axes)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        listed = [axis for axis in self.axes if axis is not None]
        left_out = [axis for axis in range(ours.ndim) if axis not in listed]
        return ours.transpose(*listed, *left_out).reshape(self.shape(ours.shape))

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array, of the shape `shape`."""
        listed = [axis for axis in self.axes if axis is not None]
        squeezed = theirs.reshape([shape[axis] for axis in listed])
        return squeezed.transpose(np.argsort(listed)).reshape(shape)
