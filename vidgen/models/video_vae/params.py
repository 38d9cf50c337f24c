"""Tensor names of the autoencoder in diffusers (`AutoencoderKLWan`) and in Wan's original checkpoints."""

import re
from collections.abc import Callable, Iterable

from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.models.video_vae.config import VAEConfig

__all__ = ["diffusers_names", "wan_names"]

_BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(?:blocks\.(\d+)|(?:down|up)sample)\.(.+)")


def diffusers_names(config: VAEConfig, names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in diffusers.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    plain = {
        "mid_block.first.": "mid_block.resnets.0.",
        "mid_block.attention.": "mid_block.attentions.0.",
        "mid_block.second.": "mid_block.resnets.1.",
        ".attentions.0.out.": ".attentions.0.proj.",
        ".shortcut.": ".conv_shortcut.",
        ".space.": ".resample.1.",
        ".time.": ".time_conv.",
    }

    def block(side: str, level: int, index: int | None, rest: str) -> str:
        if side == "decoder.up":
            sampler = "upsampler" if config.level_shortcuts else "upsamplers.0"
            inner = sampler if index is None else f"resnets.{index}"
        elif config.level_shortcuts:
            inner = "downsampler" if index is None else f"resnets.{index}"
        else:
            count = config.num_res_blocks
            return f"{side}_blocks.{level * (count + 1) + (count if index is None else index)}.{rest}"
        return f"{side}_blocks.{level}.{inner}.{rest}"

    return _table(names, plain, block)


def wan_names(config: VAEConfig, names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in the checkpoints that Wan's authors published.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    plain = {
        ".norm1.": ".residual.0.",
        ".conv1.": ".residual.2.",
        ".norm2.": ".residual.3.",
        ".conv2.": ".residual.6.",
        ".conv_in.": ".conv1.",
        ".norm_out.": ".head.0.",
        ".conv_out.": ".head.2.",
        "post_quant_conv.": "conv2.",
        "quant_conv.": "conv1.",
        "mid_block.first.": "middle.0.",
        "mid_block.attention.": "middle.1.",
        "mid_block.second.": "middle.2.",
        ".middle.1.out.": ".middle.1.proj.",
        ".space.": ".resample.1.",
        ".time.": ".time_conv.",
    }

    def block(side: str, level: int, index: int | None, rest: str) -> str:
        coder, direction = side.split(".")
        count = config.num_res_blocks + (direction == "up")
        index = count if index is None else index
        samples = f"{direction}samples"
        if config.level_shortcuts:
            return f"{coder}.{samples}.{level}.{samples}.{index}.{rest}"
        return f"{coder}.{samples}.{level * (count + 1) + index}.{rest}"

    return _table(names, plain, block)


def _table(
    names: Iterable[str], plain: dict[str, str], block: Callable[[str, int, int | None, str], str]
) -> dict[str, TensorMapping]:
    table = {}
    for name in names:
        external = name
        if found := _BLOCK.fullmatch(name):
            side, level, index, rest = found.groups()
            external = block(side, int(level), None if index is None else int(index), rest)
        for native_part, external_part in plain.items():
            external = external.replace(native_part, external_part)
        external = re.sub(r"\.kernel$", ".weight", re.sub(r"\.scale$", ".gamma", external))
        table[name] = TensorMapping(external, _axes(name))
    return table


def _axes(name: str) -> tuple[int | None, ...]:
    if name.endswith(".bias"):
        return (0,)
    if name.endswith(".scale"):
        return (0, None, None) if ".attention." in name else (0, None, None, None)
    if ".attention." in name:
        return (1, 0, None, None)
    return (4, 3, 1, 2) if ".space." in name else (4, 3, 0, 1, 2)
