"""Tensor names of the T5 encoder in transformers and in Wan's original checkpoint."""

from collections.abc import Iterable, Mapping

from vidgen.ckpt.tensor_mapping import TensorMapping

__all__ = ["transformers_names", "wan_names"]

_TRANSFORMERS = {
    "embedding": "shared.weight",
    "position_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm.scale": "encoder.final_layer_norm.weight",
    "layers.attention_norm.scale": "encoder.block.{}.layer.0.layer_norm.weight",
    "layers.attention.query.kernel": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "layers.attention.key.kernel": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "layers.attention.value.kernel": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "layers.attention.out.kernel": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "layers.attention.position_bias": (
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "layers.ffn_norm.scale": "encoder.block.{}.layer.1.layer_norm.weight",
    "layers.ffn.gate.kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "layers.ffn.up.kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "layers.ffn.down.kernel": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
}
_WAN = {
    "embedding": "token_embedding.weight",
    "norm.scale": "norm.weight",
    "layers.attention_norm.scale": "blocks.{}.norm1.weight",
    "layers.attention.query.kernel": "blocks.{}.attn.q.weight",
    "layers.attention.key.kernel": "blocks.{}.attn.k.weight",
    "layers.attention.value.kernel": "blocks.{}.attn.v.weight",
    "layers.attention.out.kernel": "blocks.{}.attn.o.weight",
    "layers.attention.position_bias": "blocks.{}.pos_embedding.embedding.weight",
    "layers.ffn_norm.scale": "blocks.{}.norm2.weight",
    "layers.ffn.gate.kernel": "blocks.{}.ffn.gate.0.weight",
    "layers.ffn.up.kernel": "blocks.{}.ffn.fc1.weight",
    "layers.ffn.down.kernel": "blocks.{}.ffn.fc2.weight",
}


def transformers_names(names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in transformers' `T5EncoderModel` and `UMT5EncoderModel`.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    return {name: _mapping(name, _TRANSFORMERS) for name in names}


def wan_names(names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in the UMT5 checkpoint that Wan's authors published.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    return {name: _mapping(name, _WAN) for name in names}


def _mapping(name: str, table: Mapping[str, str]) -> TensorMapping:
    axes = (0,) if name.endswith(".scale") else (1, 0) if name.endswith(".kernel") else (0, 1)
    return TensorMapping(table[name], axes, stacked=name.startswith("layers."))
