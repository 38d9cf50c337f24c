"""Name and layout of a tensor in a checkpoint of another program."""

import dataclasses

import numpy as np

__all__ = ["TensorMapping"]


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """Maps an array of a vidgen model to a tensor of an external checkpoint, or to one per layer.

    Attributes:
      external_name: of the tensor, with `{}` for the layer's number if `stacked`.
      permutation: for each axis of the tensor the native axis that it comes from; None is an axis of length 1
        that the array lacks. Native axes that are not listed have length 1. For PyTorch a linear kernel has
        (1, 0), a 3D filter (4, 3, 0, 1, 2).
      reshape: shape that the native array takes before the permutation, where one native axis is several
        axes of the tensor.
      stacked: the array's first axis is the layers. The other attributes describe one layer.
    """

    external_name: str
    permutation: tuple[int | None, ...]
    reshape: tuple[int, ...] | None = None
    stacked: bool = False

    def external_shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of one layer whose array has the shape `native`."""
        shape = self.reshape or native
        return tuple(1 if axis is None else shape[axis] for axis in self.permutation)

    def external_shapes(self, native: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that make the array of the shape `native`, layers included."""
        if not self.stacked:
            return {self.external_name: self.external_shape(native)}
        return {
            self.external_name.format(layer): self.external_shape(native[1:]) for layer in range(native[0])
        }

    def to_external(self, native: np.ndarray) -> np.ndarray:
        """The tensor of one layer's array."""
        reshaped = native.reshape(self.reshape or native.shape)
        listed = [axis for axis in self.permutation if axis is not None]
        of_length_one = [axis for axis in range(reshaped.ndim) if axis not in listed]
        return reshaped.transpose(*listed, *of_length_one).reshape(self.external_shape(native.shape))

    def to_native(self, external: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The array, of the shape `shape`, of one layer's tensor."""
        listed = [axis for axis in self.permutation if axis is not None]
        sizes = self.reshape or shape
        squeezed = external.reshape([sizes[axis] for axis in listed])
        return squeezed.transpose(np.argsort(listed)).reshape(shape)
