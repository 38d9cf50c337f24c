"""How a tensor in a checkpoint of another program relates to one of ours."""

import dataclasses

import numpy as np

__all__ = ["Foreign"]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Name and layout of a tensor, or of one per layer where ours holds all layers.

    Attributes:
      name: in the checkpoint, with `{}` for the number of the layer if `stacked`.
      axes: which of our axes each of its axes is, None for one of length 1 that we lack. Axes of ours that
        are not listed have length 1. In PyTorch a linear map's are (1, 0), a 3D filter's (4, 3, 0, 1, 2).
      view: shape in which our array is seen first, for an axis of ours that is several of its axes.
      stacked: our first axis, of which the others say nothing, is the layers.
    """

    name: str
    axes: tuple[int | None, ...]
    view: tuple[int, ...] | None = None
    stacked: bool = False

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, where ours (of one layer) has the shape `ours`."""
        viewed = self.view or ours
        return tuple(1 if axis is None else viewed[axis] for axis in self.axes)

    def shapes(self, ours: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of which ours, of the shape `ours`, is made."""
        if not self.stacked:
            return {self.name: self.shape(ours)}
        return {self.name.format(layer): self.shape(ours[1:]) for layer in range(ours[0])}

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Its tensor; of one layer."""
        viewed = ours.reshape(self.view or ours.shape)
        listed = [axis for axis in self.axes if axis is not None]
        left_out = [axis for axis in range(viewed.ndim) if axis not in listed]
        return viewed.transpose(*listed, *left_out).reshape(self.shape(ours.shape))

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array, of the shape `shape`; of one layer."""
        listed = [axis for axis in self.axes if axis is not None]
        viewed = self.view or shape
        squeezed = theirs.reshape([viewed[axis] for axis in listed])
        return squeezed.transpose(np.argsort(listed)).reshape(shape)
