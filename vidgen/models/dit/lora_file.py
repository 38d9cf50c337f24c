"""Updates of low rank to the transformer in files, as PEFT (diffusers) and ComfyUI spell them."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.ckpt.tensor_files import TensorFiles, TensorSpec, WeightsError, write_tensors
from vidgen.core.errors import UserError
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import diffusers_names, wan_names
from vidgen.nn.layers import Linear
from vidgen.nn.lora import ATTRIBUTE, LowRank, adapted, linears

__all__ = ["Spelling", "load_lora", "save_lora"]

Spelling = Literal["peft", "comfyui"]
"""`transformer.blocks.0.attn1.to_q.lora_A.weight` (and `lora_B`) with diffusers' names, or
`diffusion_model.blocks.0.self_attn.q.lora_down.weight` (and `lora_up`) with Wan's."""

_PREFIXES = ("", "transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model.")
_TENSOR = re.compile(r"(.+?)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight")


def save_lora(dit: DiT, path: pathlib.Path | str, spelling: Spelling = "peft") -> None:
    """Writes the updates of the adapted linear maps of `dit`.

    The second factor has the scale in it, so that readers that know of no `alpha` do the same.

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
    for name, linear in maps.items():
        update: LowRank = getattr(linear, ATTRIBUTE)
        down, up = (np.asarray(v.get_value()) for v in (update.down, update.up))
        bases = _bases(dit, name, spelling)
        stacked = down.ndim == 3
        for layer, base in enumerate(bases):
            d, u = (down[layer], up[layer]) if stacked else (down, up)
            tensors[f"{prefix}.{base}.{names[0]}.weight"] = d.T
            tensors[f"{prefix}.{base}.{names[1]}.weight"] = u.T * np.float32(update.scale)
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(path, specs, tensors.values(), metadata={"format": "pt"})


def load_lora(dit: DiT, path: pathlib.Path | str, *, scale: float = 1.0) -> None:
    """Gives the linear maps of `dit` the updates of a file, in either spelling, in place.

    Names may be those of diffusers or of Wan, kohya's underscores among them; layers that the file leaves
    out have none.

    Args:
      scale: of the updates, beside the file's own.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: the file holds something else, or is of another model; the tensors are named.
    """
    files = TensorFiles(path)
    places = _places(dit)
    pairs, strange = _pairs(files, places)
    maps = dict(linears(dit))
    sides = {name: maps[name].kernel.shape[-2:] for name, _ in pairs}
    misshaped = [
        f"  {pair.base}: {pair.down.shape} and {pair.up.shape} do not fit a map of {sides[name]}"
        for (name, _), pair in pairs.items()
        if (pair.down.shape[1], pair.up.shape[0]) != sides[name] or pair.down.shape[0] != pair.up.shape[1]
    ]
    if strange or misshaped or not pairs:
        shown = "\n".join([*(f"  {name}: unknown" for name in strange), *misshaped][:20])
        raise WeightsError(f"{path} holds no LoRA for this transformer, or not only one:\n{shown}")
    for name in sorted({name for name, _ in pairs}):
        of_map = {layer: pair for (there, layer), pair in pairs.items() if there == name}
        _put(maps[name], of_map, scale)


@dataclasses.dataclass(frozen=True)
class _Pair:
    base: str
    down: np.ndarray
    up: np.ndarray


def _bases(dit: DiT, name: str, spelling: Spelling) -> list[str]:
    """What a map, or that of each layer, is called."""
    table = diffusers_names if spelling == "peft" else wan_names
    foreign = table(dit.config, [f"{name}.kernel"])[f"{name}.kernel"]
    if foreign.view is not None:
        raise UserError(f"{name} is a convolution elsewhere, which LoRA files do not hold: leave it out")
    count = dit.config.num_layers if foreign.stacked else 1
    return [foreign.name.format(layer).removesuffix(".weight") for layer in range(count)]


def _places(dit: DiT) -> dict[str, tuple[str, int]]:
    """The map and the layer by every way in which files call it."""
    places: dict[str, tuple[str, int]] = {}
    for name, _ in linears(dit):
        if name == "patch_embedding":
            continue
        for spelling in ("peft", "comfyui"):
            for layer, base in enumerate(_bases(dit, name, spelling)):
                spelled = [*(prefix + base for prefix in _PREFIXES), "lora_unet_" + base.replace(".", "_")]
                places |= dict.fromkeys(spelled, (name, layer))
    return places


def _pairs(
    files: TensorFiles, places: Mapping[str, tuple[str, int]]
) -> tuple[dict[tuple[str, int], _Pair], list[str]]:
    """The factors by map and layer, scaled by the file's alpha; and names that mean nothing here."""
    found: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for name in files.shapes:
        base, _, last = name.rpartition(".")
        if match := _TENSOR.fullmatch(name):
            base, side = match[1], "down" if match[2] else "up"
        elif last == "alpha":
            side = "alpha"
        elif last in ("diff", "diff_b") and not files.read(name).any():
            continue  # Changes of norms and biases that are none.
        else:
            strange.append(name)
            continue
        if base not in places:
            strange.append(name)
            continue
        found.setdefault(base, {})[side] = files.read(name).astype(np.float32)
    pairs = {}
    for base, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            strange.append(f"{base} (one factor of two)")
            continue
        rank = parts["down"].shape[0]
        factor = np.float32(parts.get("alpha", rank) / rank)
        pairs[places[base]] = _Pair(base, parts["down"], parts["up"] * factor)
    return pairs, sorted(strange)


def _put(linear: Linear, pairs: Mapping[int, _Pair], scale: float) -> None:
    """An update of the largest of the ranks; where a layer's is smaller or missing, it is zero."""
    rank = max(pair.down.shape[0] for pair in pairs.values())
    update = nnx.eval_shape(lambda: LowRank(linear, rank, scale, rngs=nnx.Rngs(0)))
    down, up = (np.zeros(variable.shape, np.float32) for variable in (update.down, update.up))
    for layer, pair in pairs.items():
        into = (down[layer], up[layer]) if down.ndim == 3 else (down, up)
        into[0][:, : pair.down.shape[0]] = pair.down.T
        into[1][: pair.up.shape[1]] = pair.up.T
    for variable, array in ((update.down, down), (update.up, up)):
        variable.set_value(_beside(jnp.asarray(array), linear))
    setattr(linear, ATTRIBUTE, update)


def _beside(array: jax.Array, linear: Linear) -> jax.Array:
    """`array` on the devices that have the kernel, a copy on each."""
    sharding = linear.kernel.get_value().sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return array
    return jax.device_put(array, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))
