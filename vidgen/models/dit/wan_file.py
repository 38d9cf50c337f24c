"""Loads and saves the transformer as a single file with Wan's or diffusers' names, as ComfyUI uses."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

from flax import nnx
from jax.sharding import Mesh

from vidgen.ckpt.pretrained import load_module
from vidgen.ckpt.tensor_files import WeightsError
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.ckpt.weights import save_weights, tensor_shapes
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import diffusers_names, wan_names

__all__ = ["load_wan", "read_shape", "save_wan"]

_Table = Callable[[DiTConfig, Iterable[str]], dict[str, TensorMapping]]

_HEAD_DIM = 128
"""Head width of all transformers that Wan's authors published."""

_QUERY = re.compile(r"(.*)blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight")


def load_wan(path: pathlib.Path | str, mesh: Mesh | None = None, *, num_heads: int | None = None) -> DiT:
    """Loads a transformer from a file (or several with an index), with the dtypes of the file.

    Args:
      mesh: mesh to shard the weights over; None is one device.
      num_heads: number of heads, which the tensors do not determine; None is heads of 128 channels, as Wan's.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: the file holds no Wan transformer, or its tensors do not fit together.
    """
    config, table, prefix = read_shape(path, num_heads=num_heads)

    def names(native_names: Iterable[str]) -> dict[str, TensorMapping]:
        return {
            name: dataclasses.replace(mapping, external_name=prefix + mapping.external_name)
            for name, mapping in table(config, native_names).items()
        }

    return load_module(
        path,
        lambda: DiT(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        names=names,
        ignore=r".*\.(norm_q_img|norm_added_q)\.weight",
        keep_dtypes=True,
    )


def save_wan(dit: DiT, path: pathlib.Path | str) -> None:
    """Writes the transformer with Wan's original names; the file is written atomically."""
    params = nnx.state(dit, nnx.Param, graph=False)
    names = wan_names(dit.config, named_leaves(params))
    save_weights(path, params, names=names, metadata={"format": "pt"})


def read_shape(path: pathlib.Path | str, *, num_heads: int | None = None) -> tuple[DiTConfig, _Table, str]:
    """Config of the transformer in a file, its name table, and the prefix of its tensor names.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: the file holds no Wan transformer.
    """
    shapes = tensor_shapes(path)
    found = next((match for name in shapes if (match := _QUERY.fullmatch(name))), None)
    if found is None:
        raise WeightsError(
            f"{path} is no transformer of Wan: expected blocks.0.self_attn.q.weight or "
            f"blocks.0.attn1.to_q.weight, found {', '.join(list(shapes)[:3])} ..."
        )
    prefix = found[1]
    table = wan_names if found[2] == "self_attn.q" else diffusers_names
    unprefixed = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    shape_of = functools.partial(_shape_of, unprefixed, table, path)
    model_dim, in_channels, *patch = shape_of("patch_embedding.kernel")
    if num_heads is None and model_dim % _HEAD_DIM:
        raise WeightsError(
            f"{path}: a width of {model_dim} is no multiple of {_HEAD_DIM}, the width of Wan's heads: "
            "give the number of heads"
        )
    out_channels = shape_of("head.proj.kernel")[0] // math.prod(patch)
    positions = shape_of("condition_embedder.image.positions", required=False)
    image = shape_of("condition_embedder.image.up.kernel", required=False)
    blocks = {int(m[1]) for name in unprefixed if (m := re.match(r"blocks\.(\d+)\.", name))}
    config = DiTConfig(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        patch_size=(patch[0], patch[1], patch[2]),
        model_dim=model_dim,
        num_layers=max(blocks) + 1,
        num_heads=model_dim // _HEAD_DIM if num_heads is None else num_heads,
        ffn_dim=shape_of("blocks.ffn.up.kernel")[0],
        text_dim=shape_of("condition_embedder.text_1.kernel")[1],
        freq_dim=shape_of("condition_embedder.time_1.kernel")[1],
        image_dim=image[0] if image else None,
        image_positions=positions[1] if positions else 0,
    )
    return config, table, prefix


def _shape_of(
    shapes: Mapping[str, tuple[int, ...]],
    table,
    path: pathlib.Path | str,
    native_name: str,
    *,
    required: bool = True,
) -> tuple[int, ...]:
    """External shape of the parameter `native_name` in the first layer; () if missing and not required."""
    name = table(DiTConfig(), [native_name])[native_name].external_name.format(0)
    if name not in shapes and required:
        raise WeightsError(f"{path} lacks {name}: expected a complete Wan transformer")
    return shapes.get(name, ())
