"""LoRA files of the transformer, as PEFT (diffusers), ComfyUI and kohya's trainers spell them."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from vidgen.ckpt.tensor_files import TensorFiles, TensorSpec, write_tensors
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.models.dit.lora_tensors import LoRATensors, Pair, Place, read_tensors
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import diffusers_names, wan_names
from vidgen.nn.layers import Linear
from vidgen.nn.lora import ATTRIBUTE, LowRank, adapted, add_to_layers, linears, place_like

__all__ = ["Spelling", "load_lora", "save_lora"]

Spelling = Literal["peft", "comfyui"]
"""`transformer.blocks.0.attn1.to_q.lora_A.weight` (and `lora_B`) with diffusers' names, or
`diffusion_model.blocks.0.self_attn.q.lora_down.weight` (and `lora_up`) with Wan's."""

_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Of folders: what PEFT and diffusers write into one."""


def save_lora(dit: DiT, path: pathlib.Path | str, spelling: Spelling = "peft") -> None:
    """Writes the updates of the adapted linear maps of `dit`.

    The second factor has the scale in it, so that readers that know of no `alpha` do the same; for those that
    do, the header says that alpha is the rank, as diffusers or kohya's trainers say it.

    Raises:
      UserError: there are none, or one of a map that is no matrix there.
    """
    maps = adapted(dit)
    if not maps:
        raise UserError("the transformer has no update of low rank: train one with task.lora")
    peft = spelling == "peft"
    prefix, names = (
        ("transformer", ("lora_A", "lora_B")) if peft else ("diffusion_model", ("lora_down", "lora_up"))
    )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, linear in maps.items():
        update: LowRank = getattr(linear, ATTRIBUTE)
        down, up = (np.asarray(v.get_value()) for v in (update.down, update.up))
        bases = _bases(dit, name, spelling)
        stacked = down.ndim == 3
        for layer, base in enumerate(bases):
            d, u = (down[layer], up[layer]) if stacked else (down, up)
            tensors[f"{prefix}.{base}.{names[0]}.weight"] = d.T
            tensors[f"{prefix}.{base}.{names[1]}.weight"] = u.T * np.float32(update.scale)
            ranks[base] = d.shape[-1]
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    metadata = _adapter_metadata(ranks) if peft else _kohya_metadata(ranks)
    write_tensors(path, specs, tensors.values(), metadata={"format": "pt", **metadata})


def _adapter_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """PEFT's config of the adapter, as diffusers keeps it in the header."""
    rank = max(ranks.values())
    others = {base: other for base, other in ranks.items() if other != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
    }
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return {"lora_adapter_metadata": text}


def _kohya_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """What kohya's trainers say in the header, which has no words for several ranks."""
    if len(set(ranks.values())) > 1:
        return {}
    rank = str(max(ranks.values()))
    return {"ss_network_dim": rank, "ss_network_alpha": rank}


def _bases(dit: DiT, name: str, spelling: Spelling) -> list[str]:
    """What a map, or that of each layer, is called."""
    table = diffusers_names if spelling == "peft" else wan_names
    mapping = table(dit.config, [f"{name}.kernel"])[f"{name}.kernel"]
    if mapping.reshape is not None:
        raise UserError(f"{name} is a convolution elsewhere, which LoRA files do not hold: leave it out")
    count = dit.config.num_layers if mapping.stacked else 1
    return [mapping.external_name.format(layer).removesuffix(".weight") for layer in range(count)]


def load_lora(dit: DiT, path: pathlib.Path | str, *, scale: float = 1.0) -> None:
    """Gives the linear maps of `dit` the updates of a file, in any of the spellings, in place.

    Names may be those of diffusers or of Wan, kohya's underscores among them; layers that the file leaves
    out have none. Changes of whole arrays (`diff`, and `diff_b` or `lora_B.bias` of biases; files of
    distilled models have them) are added to the weights at once. `lora_scale` finds each update's alpha.

    Args:
      path: of the file, or the folder that PEFT or diffusers wrote.
      scale: of the updates, beside the file's own.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: the file holds something else, or is of another model; the tensors are named. Nothing is
        changed.
      UserError: what the file or its adapter_config.json says of alpha cannot be used.
    """
    limits.LORA_SCALE.check(scale, "the scale of a LoRA")
    path = _file(pathlib.Path(path))
    found = read_tensors(TensorFiles(path), dit, path)
    maps = dict(linears(dit))
    for name in sorted({place.name for place in found.pairs}):
        of_map = {place: pair for place, pair in found.pairs.items() if place.name == name}
        _put(maps[name.removesuffix(".kernel")], of_map, scale)
    _add(dit, found, scale)


def _file(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        return path
    return next((path / name for name in _FILES if (path / name).exists()), path / _FILES[0])


def _put(linear: Linear, pairs: Mapping[Place, Pair], scale: float) -> None:
    """An update of the largest of the ranks; where a layer's is smaller or missing, it is zero."""
    rank = max(pair.rank for pair in pairs.values())
    update = nnx.eval_shape(lambda: LowRank(linear, rank, scale, rngs=nnx.Rngs(0)))
    down, up = (np.zeros(variable.shape, np.float32) for variable in (update.down, update.up))
    for place, pair in pairs.items():
        into = (down, up) if place.layer is None else (down[place.layer], up[place.layer])
        into[0][:, : pair.rank], into[1][: pair.rank] = pair.read()
    for variable, array in ((update.down, down), (update.up, up)):
        variable.set_value(place_like(array, linear.kernel, variable.get_metadata("axes")))
    setattr(linear, ATTRIBUTE, update)


def _add(dit: DiT, found: LoRATensors, scale: float) -> None:
    """Adds the changes of whole arrays."""
    for name in sorted({place.name for place in found.changes}):
        variable: Any = functools.reduce(getattr, name.split("."), dit)
        changes = {place.layer: read for place, read in found.changes.items() if place.name == name}
        add_to_layers(variable, changes, scale=scale)
