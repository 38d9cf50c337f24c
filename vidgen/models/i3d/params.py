"""Loads I3D from a safetensors file with the tensor names of the PyTorch port (`pytorch-i3d`)."""

import pathlib
from collections.abc import Iterable

from flax import nnx

from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.models.i3d.model import I3D

__all__ = ["i3d_names", "load_i3d"]

_MODULES = {"conv_1a": "Conv3d_1a_7x7", "conv_2b": "Conv3d_2b_1x1", "conv_2c": "Conv3d_2c_3x3"}
_TENSORS = {
    "kernel": TensorMapping("conv3d.weight", (4, 3, 0, 1, 2)),
    "scale": TensorMapping("bn.weight", (0,)),
    "bias": TensorMapping("bn.bias", (0,)),
    "mean": TensorMapping("bn.running_mean", (0,)),
    "variance": TensorMapping("bn.running_var", (0,)),
}
_LOGITS = {
    "logits_kernel": TensorMapping("logits.conv3d.weight", (1, 0, None, None, None)),
    "logits_bias": TensorMapping("logits.conv3d.bias", (0,)),
}
_IGNORE = r".*\.num_batches_tracked"
_REMEDY = (
    "expected the state_dict of pytorch-i3d's `InceptionI3d(400, in_channels=3)` (rgb_imagenet), "
    "Conv3d_1a_7x7.conv3d.weight to logits.conv3d.bias"
)


def load_i3d(path: pathlib.Path | str) -> I3D:
    """Loads I3D from a safetensors file.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: tensors are missing, unexpected or of another shape; names each, and the expected file.
    """
    return load_module(path, lambda: I3D(rngs=nnx.Rngs(0)), names=i3d_names, ignore=_IGNORE, remedy=_REMEDY)


def i3d_names(names: Iterable[str]) -> dict[str, TensorMapping]:
    """External tensor name and layout of each parameter and statistic.

    Args:
      names: dotted names of parameters and statistics (`vidgen.core.tree.named_leaves`).
    """
    table = {}
    for name in names:
        if name in _LOGITS:
            table[name] = _LOGITS[name]
            continue
        module, *branch, kind = name.split(".")
        external, tensor = _MODULES.get(module, module.capitalize()), _TENSORS[kind]
        table[name] = TensorMapping(".".join([external, *branch, tensor.external_name]), tensor.permutation)
    return table
