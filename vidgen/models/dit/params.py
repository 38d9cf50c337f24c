"""Tensor names of the transformer in diffusers (`WanTransformer3DModel`) and Wan's original checkpoints."""

import re
from collections.abc import Iterable, Mapping

from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.models.dit.config import DiTConfig

__all__ = ["MATRICES", "diffusers_names", "wan_names"]

MATRICES = r"(?!condition_embedder\.time).*\.kernel"
"""All kernels but the timestep embedding's, whose matrix products are in float32."""

_DIFFUSERS = {
    "condition_embedder.time_1": "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_2": "condition_embedder.time_embedder.linear_2",
    "condition_embedder.text_1": "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_2": "condition_embedder.text_embedder.linear_2",
    "condition_embedder.image.norm_in": "condition_embedder.image_embedder.norm1",
    "condition_embedder.image.up": "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image.down": "condition_embedder.image_embedder.ff.net.2",
    "condition_embedder.image.norm_out": "condition_embedder.image_embedder.norm2",
    "condition_embedder.image.positions": "condition_embedder.image_embedder.pos_embed",
    "head.proj": "proj_out",
    "head.scale_shift_table": "scale_shift_table",
    "self_attention": "attn1",
    "cross_attention": "attn2",
    # Applied second: diffusers numbers norms in order of application, Wan calls this one norm3.
    "cross_norm": "norm2",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "query_norm": "norm_q",
    "key_norm": "norm_k",
    "second_key": "add_k_proj",
    "second_value": "add_v_proj",
    "second_key_norm": "norm_added_k",
    "ffn.up": "ffn.net.0.proj",
    "ffn.down": "ffn.net.2",
}
_WAN = {
    "condition_embedder.time_1": "time_embedding.0",
    "condition_embedder.time_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_1": "text_embedding.0",
    "condition_embedder.text_2": "text_embedding.2",
    "condition_embedder.image.norm_in": "img_emb.proj.0",
    "condition_embedder.image.up": "img_emb.proj.1",
    "condition_embedder.image.down": "img_emb.proj.3",
    "condition_embedder.image.norm_out": "img_emb.proj.4",
    "condition_embedder.image.positions": "img_emb.emb_pos",
    "head.proj": "head.head",
    "head.scale_shift_table": "head.modulation",
    "scale_shift_table": "modulation",
    "self_attention": "self_attn",
    "cross_attention": "cross_attn",
    "cross_norm": "norm3",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "o",
    "query_norm": "norm_q",
    "key_norm": "norm_k",
    "second_key": "k_img",
    "second_value": "v_img",
    "second_key_norm": "norm_k_img",
    "ffn.up": "ffn.0",
    "ffn.down": "ffn.2",
}


_NAME = re.compile(r"(?:blocks\.)?(.*?)(?:\.(kernel|scale|bias))?")


def diffusers_names(config: DiTConfig, names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in diffusers.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    return {name: _mapping(name, _DIFFUSERS, config) for name in names}


def wan_names(config: DiTConfig, names: Iterable[str]) -> dict[str, TensorMapping]:
    """Name and layout of each parameter in the checkpoints that Wan's authors published.

    Args:
      names: dotted parameter names (`vidgen.core.tree.named_leaves`).
    """
    return {name: _mapping(name, _WAN, config) for name in names}


def _mapping(name: str, table: Mapping[str, str], config: DiTConfig) -> TensorMapping:
    if name == "patch_embedding.kernel":
        reshape = (*config.patch_size, config.in_channels, config.model_dim)
        return TensorMapping("patch_embedding.weight", (4, 3, 0, 1, 2), reshape=reshape)
    stacked = name.startswith("blocks.")
    found = _NAME.fullmatch(name)
    assert found is not None
    path, kind = found.groups()
    external = table.get(path) or ".".join(table.get(part, part) for part in path.split("."))
    external = ("blocks.{}." if stacked else "") + external
    if kind is not None:
        external += ".bias" if kind == "bias" else ".weight"
    # External scale_shift_tables and position embeddings have a leading batch axis.
    axes = {"kernel": (1, 0), None: (None, 0, 1)}.get(kind, (0,))
    return TensorMapping(external, axes, stacked=stacked)
