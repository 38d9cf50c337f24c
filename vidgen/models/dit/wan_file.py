"""The transformer out of single files, under the names of Wan or of diffusers, as ComfyUI has it too."""

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
"""Of all transformers that Wan's authors published."""

_QUERY = re.compile(r"(.*)blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight")


def load_wan(path: pathlib.Path | str, mesh: Mesh | None = None, *, num_heads: int | None = None) -> DiT:
    """The transformer in a file (or several with an index), its arrays in the types of the file.

    Args:
      mesh: over which the weights are laid; None is one device.
      num_heads: which the tensors do not tell; None is heads of 128, Wan's.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: it is no transformer of Wan, or its tensors do not fit together.
    """
    config, table, prefix = read_shape(path, num_heads=num_heads)

    def names(ours: Iterable[str]) -> dict[str, TensorMapping]:
        found = table(config, ours)
        return {
            name: dataclasses.replace(f, external_name=prefix + f.external_name) for name, f in found.items()
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
    """Writes the transformer under Wan's own names; the file appears whole."""
    params = nnx.state(dit, nnx.Param, graph=False)
    names = wan_names(dit.config, named_leaves(params))
    save_weights(path, params, names=names, metadata={"format": "pt"})


def read_shape(path: pathlib.Path | str, *, num_heads: int | None = None) -> tuple[DiTConfig, _Table, str]:
    """The shape of the transformer in a file, the table of its names, and what stands before each.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: it is no transformer of Wan.
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
    inside = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    of = functools.partial(_shape_of, inside, table, path)
    model_dim, in_channels, *patch = of("patch_embedding.kernel")
    if num_heads is None and model_dim % _HEAD_DIM:
        raise WeightsError(
            f"{path}: a width of {model_dim} is no multiple of {_HEAD_DIM}, the width of Wan's heads: "
            "give the number of heads"
        )
    out_channels = of("head.proj.kernel")[0] // math.prod(patch)
    positions = of("condition_embedder.image.positions", required=False)
    image = of("condition_embedder.image.up.kernel", required=False)
    blocks = {int(m[1]) for name in inside if (m := re.match(r"blocks\.(\d+)\.", name))}
    config = DiTConfig(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        patch_size=(patch[0], patch[1], patch[2]),
        model_dim=model_dim,
        num_layers=max(blocks) + 1,
        num_heads=model_dim // _HEAD_DIM if num_heads is None else num_heads,
        ffn_dim=of("blocks.ffn.up.kernel")[0],
        text_dim=of("condition_embedder.text_1.kernel")[1],
        freq_dim=of("condition_embedder.time_1.kernel")[1],
        image_dim=image[0] if image else None,
        image_positions=positions[1] if positions else 0,
    )
    return config, table, prefix


def _shape_of(
    shapes: Mapping[str, tuple[int, ...]],
    table,
    path: pathlib.Path | str,
    ours: str,
    *,
    required: bool = True,
) -> tuple[int, ...]:
    """The shape there of the tensor of ours with that name, of the first layer."""
    name = table(DiTConfig(), [ours])[ours].external_name.format(0)
    if name not in shapes and required:
        raise WeightsError(f"{path} lacks {name}: it is no whole transformer of Wan")
    return shapes.get(name, ())
