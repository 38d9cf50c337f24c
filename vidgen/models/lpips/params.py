"""Loads LPIPS from a safetensors file with the tensor names of torchvision or of the package `lpips`."""

import functools
import pathlib
import re
from collections.abc import Iterable

from flax import nnx

from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.ckpt.weights import tensor_shapes
from vidgen.models.lpips.model import LPIPS

__all__ = ["load_lpips", "lpips_names"]

_FEATURES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of each stage's convolutions in torchvision's `vgg16().features`."""

_IGNORE = r"classifier\..*|lins\..*|scaling_layer\..*"
"""VGG16's classifier, the duplicate names of the heads in the package `lpips`, and its constants."""

_REMEDY = (
    "expected `vgg16().state_dict()` of torchvision with lin0.model.1.weight to lin4.model.1.weight of the "
    'package lpips (v0.1, vgg), or `lpips.LPIPS(net="vgg").state_dict()`'
)


def load_lpips(path: pathlib.Path | str) -> LPIPS:
    """Loads LPIPS from a safetensors file.

    Tensors have either torchvision's names for VGG16's features (`features.0.weight`) and the names of the
    package `lpips` for the heads (`lin0.model.1.weight`), or the names of that package's `LPIPS(net="vgg")`
    throughout (`net.slice1.0.weight`). VGG16's classifier is ignored.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: tensors are missing, unexpected or of another shape; names each, and the expected file.
    """
    whole = any(name.startswith("net.") for name in tensor_shapes(path))
    return load_module(
        path,
        lambda: LPIPS(rngs=nnx.Rngs(0)),
        names=functools.partial(lpips_names, whole=whole),
        ignore=_IGNORE,
        remedy=_REMEDY,
    )


def lpips_names(names: Iterable[str], *, whole: bool) -> dict[str, TensorMapping]:
    """External tensor name and layout of each parameter.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
      whole: the file is the state dict of the package `lpips`; otherwise VGG16 has torchvision's names.
    """
    table = {}
    for name in names:
        if head := re.fullmatch(r"heads\.(\d)", name):
            table[name] = TensorMapping(f"lin{head[1]}.model.1.weight", (None, 0, None, None))
            continue
        _, stage, index, kind = name.split(".")
        layer = _FEATURES[int(stage)][int(index)]
        module = f"net.slice{int(stage) + 1}.{layer}" if whole else f"features.{layer}"
        weight = TensorMapping(f"{module}.weight", (4, 3, 1, 2))
        table[name] = weight if kind == "kernel" else TensorMapping(f"{module}.bias", (0,))
    return table
