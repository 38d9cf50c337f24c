"""Weights stored as 8-bit floats with a scale each, as in ComfyUI's `fp8_scaled` files."""

import pathlib
import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from vidgen.ckpt.tensor_files import TensorFiles, WeightsError
from vidgen.core.files import parse_json

__all__ = ["ScaledTensors"]

_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)")
_UNUSED = re.compile(r"(?:.*\.)?scaled_fp8|.+\.(?:scale_input|input_scale|comfy_quant)")
"""The format's marker, and ComfyUI's scales for 8-bit products: products have a higher precision here."""
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class ScaledTensors(TensorFiles):
    """`TensorFiles` in which a weight with a scale is their product, in float32.

    A scale is one number, or one per row of a matrix. Tensors without a scale are unchanged.
    """

    def __init__(self, path: pathlib.Path | str):
        """Reads the headers.

        Raises:
          WeightsError: a scale has no weight, or its weight is not stored as 8-bit floats; otherwise as in
            `TensorFiles`.
        """
        super().__init__(path)
        self._scales = dict(self._scaled())
        for name in [name for name in self.shapes if _SCALE.fullmatch(name) or _UNUSED.fullmatch(name)]:
            self._check_format(name)
            del self.shapes[name], self.dtypes[name]
        self.dtypes |= dict.fromkeys(self._scales, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, read-only."""
        if name not in self._scales:
            return super().read(name)
        scale, dtype = self._scales[name]
        stored = self._places[name].view(dtype).reshape(self.shapes[name])
        return stored.astype(np.float32) * scale

    def _scaled(self) -> Iterator[tuple[str, tuple[np.ndarray, np.dtype]]]:
        """Yields each scaled weight with its scale, broadcastable over rows, and its stored dtype."""
        for name in list(self.shapes):
            if (match := _SCALE.fullmatch(name)) is None:
                continue
            weight = match[1] + ".weight"
            shape, dtype = self.shapes.get(weight), self.dtypes.get(weight)
            if shape is None or dtype not in _FLOAT8:
                raise WeightsError(
                    f"{self.path}: {name} scales {weight}, found {dtype or 'none'}; expected 8-bit floats"
                )
            sizes = {1, *shape[:1]}
            if self.dtypes[name].kind not in "fV" or int(np.prod(self.shapes[name])) not in sizes:
                raise WeightsError(
                    f"{self.path}: {name} is {self.dtypes[name]} {self.shapes[name]}; expected one floating "
                    f"point number, or one for each of the {shape[:1]} rows"
                )
            scale = super().read(name).astype(np.float32)
            if not np.isfinite(scale).all():
                raise WeightsError(f"{self.path}: {name} is not finite")
            assert dtype is not None
            yield (
                weight,
                (scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.size > 1 else scale.reshape(()), dtype),
            )

    def _check_format(self, name: str) -> None:
        """Checks the format of a weight that declares one."""
        if not name.endswith(".comfy_quant"):
            return
        declared = parse_json(super().read(name).tobytes()[:4096], f"{self.path}: {name}")
        kind = declared.get("format") if isinstance(declared, dict) else None
        if kind not in _FORMATS:
            raise WeightsError(f"{self.path}: {name} is of format {kind!r}; expected one of {_FORMATS}")
