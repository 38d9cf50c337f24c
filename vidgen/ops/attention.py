"""Attention dispatch: one function for all models, which picks the backend by platform and shape."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidgen.core.typing import Array, Float
from vidgen.ops import attention_cpu
from vidgen.ops.attention_blocks import ATTENTION, Blocks, block_score_bytes
from vidgen.ops.attention_cpu import SoftmaxStats
from vidgen.ops.attention_kernels import Kernels, device_kind, kernel_attention, over_mesh
from vidgen.ops.key_ranges import KeyRanges
from vidgen.ops.score_budget import ScoresTooLarge, check_scores, heads_here, refusal, report_fallback

Implementation = Literal["auto", "xla", "blocks", "cudnn", "pallas_tpu", "pallas_gpu"]

_MASK_BYTES = 2**28
"""Largest mask in bytes (one per score) that is passed to cuDNN, which reads the mask from memory."""


def attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    *,
    ranges: KeyRanges | None = None,
    bias: Float[Array, "#b n s r"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s n k"]:
    """Softmax attention, scores and softmax in float32.

    The backward pass recomputes the scores unless there are few of them. With recomputation there is no
    forward-mode derivative (`jax.jvp`).

    Args:
      ranges: keys that each query sees, from `vidgen.ops.key_ranges`; None is all. A query that sees none
        gets zeros from kernels and `blocks`, and the mean of all values from `xla`.
      bias: added to the scores.
      scale: factor on the query-key products, 1 / sqrt(k) by default.
      implementation: `pallas_tpu` and `pallas_gpu` are the kernels of `pallas_kernels.attention` (interpreted
        on CPUs, for tests); `cudnn` is NVIDIA's fused kernel, for 16-bit dtypes; `xla` is two matrix products
        and a softmax, blockwise on CPUs where there are many scores (`vidgen.ops.attention_cpu`); `blocks` is
        plain JAX that holds the scores of one block of keys in memory at a time. `auto` takes the first that
        supports the device, shapes and dtype; if that is not a kernel, it logs the reasons once per shape.

    Raises:
      NotImplementedError: the named implementation does not support these shapes or dtypes.
      ScoresTooLarge: the named implementation, or every one with `auto`, would hold more than
        `score_budget.SCORE_BYTES` of scores in memory.
    """
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    reasons: dict[str, Exception] = {}
    candidates = _candidates(query, key, ranges) if implementation == "auto" else (implementation,)
    for candidate in candidates:
        try:
            y = _backend(candidate, query, key, bias, factor)(query, key, value, ranges)
        except (NotImplementedError, ScoresTooLarge) as error:
            if implementation != "auto":
                raise
            reasons.setdefault(candidate, error)
        else:
            report_fallback(query, key, candidate, _score_bytes(candidate, query, key), reasons)
            return y
    raise refusal(query, key, reasons)


def _candidates(query: Array, key: Array, ranges: KeyRanges | None) -> Iterator[Implementation]:
    """Implementations to try, fastest first."""
    platform, _ = device_kind()
    if platform == "tpu":
        yield "pallas_tpu"
    elif platform in ("gpu", "cuda"):
        if ranges is not None and query.shape[0] * query.shape[1] * key.shape[1] > _MASK_BYTES:
            yield "pallas_gpu"
        else:
            yield "cudnn"
    yield "xla"
    if platform in ("gpu", "cuda"):
        yield "pallas_gpu"
    yield "blocks"


def _score_bytes(implementation: Implementation, query: Array, key: Array) -> int:
    """Bytes of scores that an implementation holds in one device's memory at a time."""
    (heads, queries), keys = heads_here(query), key.shape[1]
    if implementation == "blocks":
        return heads * block_score_bytes(queries, keys)
    if implementation != "xla" or (attention_cpu.worth_blocking(query, key) and device_kind()[0] == "cpu"):
        return 0
    return 4 * heads * queries * keys


def _backend(
    implementation: Implementation, query: Array, key: Array, bias: Array | None, scale: float
) -> Callable[[Array, Array, Array, KeyRanges | None], Array]:
    """Attention by the implementation, as a function of query, key, value and ranges."""
    if bias is not None and implementation not in ("xla", "cudnn"):
        raise NotImplementedError(f"attention: {implementation} takes no bias of the scores; use `xla`")
    if implementation == "pallas_tpu" or implementation == "pallas_gpu":
        return functools.partial(kernel_attention, scale=scale, kernel=Kernels.of(implementation))
    if implementation == "cudnn":
        if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] > 128 or query.shape[-1] % 8:
            raise NotImplementedError(
                f"attention: cudnn takes bfloat16 and float16, and heads of 8, 16, ... 128 channels; found "
                f"{query.dtype} and {query.shape[-1]}"
            )
        return functools.partial(_cudnn, bias=bias, scale=scale)
    check_scores(implementation, _score_bytes(implementation, query, key))
    if implementation == "blocks":
        return functools.partial(kernel_attention, scale=scale, kernel=Blocks())
    if bias is None and attention_cpu.worth_blocking(query, key):
        return functools.partial(_recomputing, scale=scale)
    return functools.partial(_saving, bias=bias, scale=scale)


def _mask(ranges: KeyRanges | None) -> Array | None:
    return None if ranges is None else ranges.visible()[:, None]


def _cudnn(
    query: Array, key: Array, value: Array, ranges: KeyRanges | None, *, bias: Array | None, scale: float
) -> Array:
    y = jax.nn.dot_product_attention(
        query, key, value, bias, _mask(ranges), scale=scale, implementation="cudnn"
    )
    return checkpoint_name(y, ATTENTION)


def _saving(
    query: Array, key: Array, value: Array, ranges: KeyRanges | None, *, bias: Array | None, scale: float
) -> Array:
    """Attention that saves its scores for the backward pass."""
    return checkpoint_name(_reference(query, key, value, _mask(ranges), bias, scale), ATTENTION)


def _reference(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> Array:
    # `jax.nn.dot_product_attention` is equivalent, but its backward pass is several times slower on CPUs.
    scores = scale * jnp.einsum("bsnk,brnk->bnsr", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnsr,brnk->bsnk", weights, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recomputing(query: Array, key: Array, value: Array, ranges: KeyRanges | None, scale: float) -> Array:
    return _forward(query, key, value, ranges, scale)[0]


def _forward(
    query: Array, key: Array, value: Array, ranges: KeyRanges | None, scale: float
) -> tuple[Array, Any]:
    def plain(query: Array, key: Array, value: Array, ranges: KeyRanges | None) -> tuple[Array, SoftmaxStats]:
        zeros = jnp.zeros_like(query[..., 0])  # Only the blockwise CPU backward pass reads the statistics.
        return _reference(query, key, value, _mask(ranges), None, scale), SoftmaxStats(zeros, zeros)

    inputs = (query, key, value, ranges)
    blocked = over_mesh(lambda _, *arrays: attention_cpu.forward(*arrays, scale=scale), inputs, outputs="qq")
    y, statistics = checkpoint_name(
        jax.lax.platform_dependent(*inputs, cpu=blocked, default=plain), ATTENTION
    )
    return y, (inputs, y, statistics)


def _backward(scale: float, residuals: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    inputs, y, statistics = residuals

    def blocked(axes: Any, query: Array, key: Array, value: Array, ranges: KeyRanges | None, *others) -> Any:
        d_query, *rest = attention_cpu.backward(query, key, value, ranges, scale, *others)
        # Devices with other queries of the same clips and heads hold the same keys: sum their gradients.
        return d_query, *(rest if axes is None else jax.lax.psum(rest, axes))

    def plain(
        query: Array, key: Array, value: Array, ranges: KeyRanges | None, y, statistics, gradient
    ) -> Any:
        call = functools.partial(_reference, mask=_mask(ranges), bias=None, scale=scale)
        return jax.vjp(call, query, key, value)[1](gradient)

    arrays = (*inputs, y, statistics, gradient)
    d_query, d_key, d_value = jax.lax.platform_dependent(
        *arrays, cpu=over_mesh(blocked, arrays, outputs="qkk"), default=plain
    )
    return d_query, d_key, d_value, None


_recomputing.defvjp(_forward, _backward)
