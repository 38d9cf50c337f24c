"""Tensor names of CLIP's image encoder in transformers."""

from collections.abc import Iterable

from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.models.clip.config import CLIPVisionConfig

__all__ = ["transformers_names"]

_LAYER = {
    "attention_norm": "layer_norm1",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "ffn_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_OUTSIDE = {
    "whole": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    # The misspelling is transformers'.
    "norm_in": "pre_layrnorm",
    "norm_out": "post_layernorm",
}


def transformers_names(
    config: CLIPVisionConfig, names: Iterable[str], *, prefix: str = ""
) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in transformers' `CLIPVisionModel`.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
      prefix: prefix of all external names; transformers before version 5 writes `vision_model.`.
    """
    return {name: _mapping(config, name, prefix) for name in names}


def _mapping(config: CLIPVisionConfig, name: str, prefix: str) -> TensorMapping:
    if name == "patch_embedding.kernel":
        reshape = (config.patch_size, config.patch_size, 3, config.dim)
        return TensorMapping(prefix + "embeddings.patch_embedding.weight", (3, 2, 0, 1), reshape=reshape)
    if name in _OUTSIDE:
        return TensorMapping(prefix + _OUTSIDE[name], (0,) if name == "whole" else (0, 1))
    path, _, kind = name.rpartition(".")
    axes = (1, 0) if kind == "kernel" else (0,)
    suffix = ".bias" if kind == "bias" else ".weight"
    if path in _OUTSIDE:
        return TensorMapping(prefix + _OUTSIDE[path] + suffix, axes)
    layer = _LAYER[path.removeprefix("layers.")]
    return TensorMapping(f"{prefix}encoder.layers.{{}}.{layer}{suffix}", axes, stacked=True)
