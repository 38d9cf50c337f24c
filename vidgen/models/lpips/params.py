"""LPIPS out of a user's safetensors file, under the names of torchvision and of the package `lpips`."""

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
"""Where torchvision's list of VGG16's layers has the convolutions of each stage."""

_IGNORE = r"classifier\..*|lins\..*|scaling_layer\..*"
"""VGG16's classifier, the package's second name of each head, and its constants."""

_REMEDY = (
    "expected `vgg16().state_dict()` of torchvision with lin0.model.1.weight to lin4.model.1.weight of the "
    'package lpips (v0.1, vgg), or `lpips.LPIPS(net="vgg").state_dict()`'
)


def load_lpips(path: pathlib.Path | str) -> LPIPS:
    """The network in a safetensors file.

    The file holds VGG16's features as torchvision names them (`features.0.weight`) and the heads as the
    package `lpips` does (`lin0.model.1.weight`), or all of it as that package's `LPIPS(net="vgg")` does
    (`net.slice1.0.weight`). The classifier of VGG16 may be there too.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: names every tensor that is missing, left over or of another shape, and what was expected.
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
    """Name and layout of each parameter in a file.

    Args:
      names: of the parameters, dotted (`vidgen.core.tree.named_leaves`).
      whole: as the package `lpips` names all of it, not torchvision's and its names side by side.
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
