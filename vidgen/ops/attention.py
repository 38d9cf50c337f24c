"""Attention dispatch: one function for every model, the backend chosen by platform and shape."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.ops import attention_cpu
from vidgen.ops.attention_blocks import ATTENTION
from vidgen.ops.attention_cpu import Masks, Statistics
from vidgen.parallel.rules import partition_spec

Implementation = Literal["xla", "cudnn"]


def attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    *,
    key_mask: Bool[Array, "b r"] | None = None,
    segment_ids: tuple[Int[Array, "b s"], Int[Array, "b r"]] | None = None,
    bias: Float[Array, "#b n s r"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "b s n k"]:
    """Softmax attention, scores and softmax in float32.

    Where scores are many, and inputs float32, the backward pass computes them anew; CPUs go through them in
    blocks (`vidgen.ops.attention_cpu`). There is no forward-mode derivative (`jax.jvp`) then.

    Args:
      key_mask: which keys may be attended to; at least one per row.
      segment_ids: of queries and keys; a query attends to keys of its own segment only.
      bias: added to the scores.
      scale: of the products, 1 / sqrt(k) by default.
      implementation: `xla` is plain products and a softmax; `cudnn` is NVIDIA's fused kernel, for 16 bits.
    """
    masks = Masks(key_mask, *(segment_ids if segment_ids is not None else (None, None)))
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "cudnn":
        y = jax.nn.dot_product_attention(
            query, key, value, bias, _mask(masks), scale=factor, implementation="cudnn"
        )
        return checkpoint_name(y, ATTENTION)
    if bias is None and attention_cpu.pays(query, key):
        return _recomputing(query, key, value, masks, factor)
    return checkpoint_name(_reference(query, key, value, _mask(masks), bias, factor), ATTENTION)


def _mask(masks: Masks) -> Array | None:
    mask = None
    if masks.keys is not None:
        mask = masks.keys[:, None, None, :]
    if masks.query_segments is not None and masks.key_segments is not None:
        same = (masks.query_segments[:, :, None] == masks.key_segments[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def _reference(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> Array:
    # `jax.nn.dot_product_attention` computes the same, but its backward pass is several times slower on CPU.
    scores = scale * jnp.einsum("bsnk,brnk->bnsr", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnsr,brnk->bsnk", weights, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recomputing(query: Array, key: Array, value: Array, masks: Masks, scale: float) -> Array:
    return _forward(query, key, value, masks, scale)[0]


def _forward(query: Array, key: Array, value: Array, masks: Masks, scale: float) -> tuple[Array, Any]:
    def plain(query: Array, key: Array, value: Array, masks: Masks) -> tuple[Array, Statistics]:
        zeros = jnp.zeros_like(query[..., 0])  # Only the blocks of CPUs need these.
        return _reference(query, key, value, _mask(masks), None, scale), Statistics(zeros, zeros)

    inputs = (query, key, value, masks)
    blocked = functools.partial(_over_mesh, lambda _, *arrays: attention_cpu.forward(*arrays, scale=scale))
    y, statistics = checkpoint_name(
        jax.lax.platform_dependent(*inputs, cpu=blocked, default=plain), ATTENTION
    )
    return y, (inputs, y, statistics)


def _backward(scale: float, residuals: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    inputs, y, statistics = residuals

    def blocked(axes: Any, query: Array, key: Array, value: Array, masks: Masks, *others: Any) -> Any:
        d_query, *rest = attention_cpu.backward(query, key, value, masks, scale, *others)
        # Devices with other queries of the same clips and heads see the same keys.
        return d_query, *(rest if axes is None else jax.lax.psum(rest, axes))

    def plain(query: Array, key: Array, value: Array, masks: Masks, y, statistics, gradient: Array) -> Any:
        call = functools.partial(_reference, mask=_mask(masks), bias=None, scale=scale)
        return jax.vjp(call, query, key, value)[1](gradient)

    d_query, d_key, d_value = jax.lax.platform_dependent(
        *inputs, y, statistics, gradient, cpu=functools.partial(_over_mesh, blocked), default=plain
    )
    return d_query, d_key, d_value, None


_recomputing.defvjp(_forward, _backward)


def _over_mesh(
    local: Callable[..., Any], query: Array, key: Array, value: Array, masks: Masks, *others: Any
) -> Any:
    """`local(axes, ...)`, each device its clips, heads and queries: a loop gathers what is cut along it.

    Args:
      local: is given the mesh axes over which queries are cut; `others` and its first output are cut as
        queries are, further outputs as `others` where there are none, else as keys.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return local(None, query, key, value, masks, *others)
    clips, tokens, heads, _ = partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    of_queries, of_keys = PartitionSpec(clips, tokens, heads), PartitionSpec(clips, None, heads)
    of_masks = Masks(PartitionSpec(clips), PartitionSpec(clips, tokens), PartitionSpec(clips))  # pyright: ignore
    return jax.shard_map(
        functools.partial(local, tokens),
        in_specs=(of_queries, of_keys, of_keys, of_masks, *[of_queries] * len(others)),
        out_specs=(of_queries, of_keys, of_keys) if others else of_queries,
        check_vma=False,
    )(query, key, value, masks, *others)
