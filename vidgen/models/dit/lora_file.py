"""Loads LoRA files with PEFT's (diffusers), ComfyUI's or kohya's tensor names; saves the first two kinds."""

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
"""Names of the LoRA file in folders that PEFT or diffusers wrote."""


def save_lora(dit: DiT, path: pathlib.Path | str, spelling: Spelling = "peft") -> None:
    """Writes the LoRA of each adapted linear map of `dit`.

    The up matrices include the scale, for readers that ignore alpha. For the others, the header gives alpha
    equal to the rank, in the form of diffusers or of kohya's trainers.

    Raises:
      UserError: `dit` has no LoRA, or has one on a map that is a convolution in diffusers and Wan.
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
        lora: LowRank = getattr(linear, ATTRIBUTE)
        down, up = (np.asarray(v.get_value()) for v in (lora.down, lora.up))
        bases = _bases(dit, name, spelling)
        stacked = down.ndim == 3
        for layer, base in enumerate(bases):
            d, u = (down[layer], up[layer]) if stacked else (down, up)
            tensors[f"{prefix}.{base}.{names[0]}.weight"] = d.T
            tensors[f"{prefix}.{base}.{names[1]}.weight"] = u.T * np.float32(lora.scale)
            ranks[base] = d.shape[-1]
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    metadata = _adapter_metadata(ranks) if peft else _kohya_metadata(ranks)
    write_tensors(path, specs, tensors.values(), metadata={"format": "pt", **metadata})


def _adapter_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """PEFT's adapter config as header metadata, in diffusers' form."""
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
    """Rank and alpha as header metadata, in kohya's form; {} for several ranks, which it cannot express."""
    if len(set(ranks.values())) > 1:
        return {}
    rank = str(max(ranks.values()))
    return {"ss_network_dim": rank, "ss_network_alpha": rank}


def _bases(dit: DiT, name: str, spelling: Spelling) -> list[str]:
    """External name of a linear map, or of each layer of a stacked one, without `.weight`."""
    table = diffusers_names if spelling == "peft" else wan_names
    mapping = table(dit.config, [f"{name}.kernel"])[f"{name}.kernel"]
    if mapping.reshape is not None:
        raise UserError(
            f"{name} is a convolution in diffusers and Wan, which LoRA files do not hold: leave it out of "
            "lora.targets"
        )
    count = dit.config.num_layers if mapping.stacked else 1
    return [mapping.external_name.format(layer).removesuffix(".weight") for layer in range(count)]


def load_lora(dit: DiT, path: pathlib.Path | str, *, scale: float = 1.0) -> None:
    """Attaches the LoRA of a file to the linear maps of `dit`, in place.

    Names may be diffusers' or Wan's, also with kohya's underscores. Layers that are not in the file get no
    LoRA. Full-rank changes (`diff`, and `diff_b` or `lora_B.bias` of biases, as in files of distilled models)
    are added to the weights directly. `lora_scale` finds each alpha.

    Args:
      path: the file, or a folder that PEFT or diffusers wrote.
      scale: extra factor of the LoRA and of full-rank changes, on top of the file's scale.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: the file holds other tensors or is of another model; names the tensors. `dit` is not
        changed.
      UserError: alpha in the file or in adapter_config.json is invalid or unsupported.
    """
    limits.LORA_SCALE.check(scale, "the scale of a LoRA")
    path = _file(pathlib.Path(path))
    found = read_tensors(TensorFiles(path), dit, path)
    maps = dict(linears(dit))
    for name in sorted({place.name for place in found.pairs}):
        pairs = {place: pair for place, pair in found.pairs.items() if place.name == name}
        _attach(maps[name.removesuffix(".kernel")], pairs, scale)
    _add_changes(dit, found, scale)


def _file(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        return path
    return next((path / name for name in _FILES if (path / name).exists()), path / _FILES[0])


def _attach(linear: Linear, pairs: Mapping[Place, Pair], scale: float) -> None:
    """Attaches a LoRA of the layers' largest rank; smaller ranks and missing layers are zero-padded."""
    rank = max(pair.rank for pair in pairs.values())
    lora = nnx.eval_shape(lambda: LowRank(linear, rank, scale, rngs=nnx.Rngs(0)))
    down, up = (np.zeros(variable.shape, np.float32) for variable in (lora.down, lora.up))
    for place, pair in pairs.items():
        down_part, up_part = (down, up) if place.layer is None else (down[place.layer], up[place.layer])
        down_part[:, : pair.rank], up_part[: pair.rank] = pair.read()
    for variable, array in ((lora.down, down), (lora.up, up)):
        variable.set_value(place_like(array, linear.kernel, variable.get_metadata("axes")))
    setattr(linear, ATTRIBUTE, lora)


def _add_changes(dit: DiT, found: LoRATensors, scale: float) -> None:
    """Adds the full-rank changes to the weights."""
    for name in sorted({place.name for place in found.changes}):
        variable: Any = functools.reduce(getattr, name.split("."), dit)
        changes = {place.layer: read for place, read in found.changes.items() if place.name == name}
        add_to_layers(variable, changes, scale=scale)
