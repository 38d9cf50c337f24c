"""Name and layout of a tensor in an external checkpoint."""

import dataclasses

import numpy as np

__all__ = ["TensorMapping"]


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """Maps an array of a vidgen model to a tensor of an external checkpoint, or to one per layer.

    Attributes:
      external_name: name of the tensor, with `{}` for the layer index if `stacked`.
      permutation: native axis of each axis of the tensor; None is an axis of length 1 that the native array
        lacks. Native axes that are not listed have length 1. A PyTorch linear kernel has (1, 0), a 3D filter
        (4, 3, 0, 1, 2).
      reshape: shape of the native array before the permutation, if one native axis is several axes of the
        tensor.
      stacked: the first axis of the native array is the layers; the other attributes describe one layer.
    """

    external_name: str
    permutation: tuple[int | None, ...]
    reshape: tuple[int, ...] | None = None
    stacked: bool = False

    def external_shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """Tensor shape of one layer, for a native array of shape `native`."""
        shape = self.reshape or native
        return tuple(1 if axis is None else shape[axis] for axis in self.permutation)

    def external_shapes(self, native: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, layers included, of a native array of shape `native`."""
        if not self.stacked:
            return {self.external_name: self.external_shape(native)}
        return {
            self.external_name.format(layer): self.external_shape(native[1:]) for layer in range(native[0])
        }

    def to_external(self, native: np.ndarray) -> np.ndarray:
        """External tensor of one layer's native array."""
        reshaped = native.reshape(self.reshape or native.shape)
        listed = [axis for axis in self.permutation if axis is not None]
        of_length_one = [axis for axis in range(reshaped.ndim) if axis not in listed]
        return reshaped.transpose(*listed, *of_length_one).reshape(self.external_shape(native.shape))

    def to_native(self, external: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Native array, of shape `shape`, of one layer's external tensor."""
        listed = [axis for axis in self.permutation if axis is not None]
        sizes = self.reshape or shape
        squeezed = external.reshape([sizes[axis] for axis in listed])
        return squeezed.transpose(np.argsort(listed)).reshape(shape)
