"""Attention on NVIDIA GPUs: Pallas kernels that Triton compiles, forward and backward.

Kernels read `b s n k` arrays without a transpose. The backward pass recomputes the scores, in one kernel for
the gradients of keys and values and in one for the gradient of queries. The order of all sums is fixed, so
results are deterministic.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from . import gpu_kernels
from .gpu_visits import list_visits
from .masks import BlockMask, KeyRanges

__all__ = ["backward", "forward"]


class _Tile(NamedTuple):
    """Tokens per block of queries and of keys (powers of two up to 128), warps, and pipeline stages."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2


class _Tiles(NamedTuple):
    forward: _Tile
    of_keys: _Tile
    of_queries: _Tile


_TILES = {
    64: _Tiles(_Tile(128, 128), _Tile(64, 128), _Tile(128, 128)),
    96: _Tiles(_Tile(128, 128), _Tile(64, 128), _Tile(128, 128)),
    128: _Tiles(_Tile(128, 128), _Tile(64, 128), _Tile(128, 128)),
    192: _Tiles(_Tile(128, 64), _Tile(32, 128), _Tile(128, 64)),
    256: _Tiles(_Tile(128, 64), _Tile(64, 64), _Tile(128, 32)),
}
"""Tiles by head dimension, for 16-bit dtypes on Hopper: 227 KiB of shared memory, 64 Ki registers, and two
groups of four warps, one of which multiplies while the other computes exponentials. Of the tiles whose
products Triton compiles to asynchronous `wgmma`, these issue the fewest instructions per score."""
_WIDE = {
    **dict.fromkeys((64, 96, 128), _Tiles(_Tile(64, 16, 4), _Tile(16, 64, 4), _Tile(64, 16, 4))),
    **dict.fromkeys((192, 256), _Tiles(_Tile(64, 16, 4), _Tile(16, 32), _Tile(32, 16))),
}
"""Tiles for float32, whose products take three passes and twice the registers: exact rather than fast."""
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LAYOUTS = {
    "query": "bsnk",
    "key": "brnk",
    "value": "brnk",
    "cotangent": "bsnk",
    "offset": "bns",
    "mean": "bns",
    "codes": "br",
    "low": "bs",
    "high": "bs",
    "order": "vi.",
    "counts": "vi.",
    "output": "bsnk",
    "log_sum_exp": "bns",
    "d_query": "bsnk",
    "d_key": "brnk",
    "d_value": "brnk",
}
"""Axes: b batch, s queries, r keys, n heads, k head dimension, i program's block, v batch or 1, `.` any."""


def forward(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Softmax attention on a GPU; same contract as `reference.forward`.

    Args:
      query, key, value: `b s n k`, `b r n k`, `b r n k`; bfloat16, float16 or float32, all the same; k is 64,
        96, 128, 192 or 256.
      scale: positive factor on the query-key products, 1 / sqrt(k) by default.
      ranges, block_mask: masks; a query sees a key if both allow it.
      interpret: interprets the kernel, on any device, slowly.

    Returns:
      The weighted mean of the values, `b s n k`, and the log-sum-exp, float32, `b n s`.

    Raises:
      NotImplementedError: unsupported head dimension, dtype or scale, or empty arrays.
      ValueError: shapes of the arrays or of the block mask do not match.
    """
    _check(query, key, value, scale, block_mask)
    b, s, n, _ = query.shape
    output, log_sum_exp = _call(
        gpu_kernels.forward,
        _tiles(query).forward,
        {"query": query, "key": key, "value": value},
        {
            "output": jax.ShapeDtypeStruct(query.shape, value.dtype),
            "log_sum_exp": jax.ShapeDtypeStruct((b, n, s), jnp.float32),
        },
        block_axis="s",
        scale=scale,
        ranges=ranges,
        block_mask=block_mask,
        interpret=interpret,
    )
    return output, log_sum_exp


def backward(
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    log_sum_exp: Array,
    cotangent: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value on a GPU; same contract as `reference.backward`.

    Args:
      output, log_sum_exp: results of `forward`, or of attention to a superset of these keys; gradients over
        the subsets then add up.
      cotangent: gradient of the loss with respect to the output, `b s n k`.

    Raises:
      NotImplementedError, ValueError: as `forward`.
    """
    _check(query, key, value, scale, block_mask)
    tiles = _tiles(query)
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "cotangent": cotangent.astype(query.dtype),
        "offset": jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp * -math.log2(math.e), -jnp.inf),
        "mean": (output.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1).swapaxes(1, 2),
    }
    like = jax.ShapeDtypeStruct.like
    options = {"scale": scale, "ranges": ranges, "block_mask": block_mask, "interpret": interpret}
    outputs = {"d_key": like(key), "d_value": like(value)}
    d_key, d_value = _call(gpu_kernels.of_keys, tiles.of_keys, arrays, outputs, block_axis="r", **options)
    outputs = {"d_query": like(query)}
    (d_query,) = _call(gpu_kernels.of_queries, tiles.of_queries, arrays, outputs, block_axis="s", **options)
    return d_query, d_key, d_value


def _check(query: Array, key: Array, value: Array, scale: float | None, block_mask: BlockMask | None) -> None:
    head = query.shape[-1]
    if key.shape != value.shape or query.shape[::2] != key.shape[::2] or head != key.shape[-1]:
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape}: expected b s n k, b r n k"
        )
    if head not in _TILES:
        raise NotImplementedError(f"head dimension {head}: the GPU kernel supports {list(_TILES)}")
    if query.dtype not in _DTYPES or {query.dtype, key.dtype} != {value.dtype}:
        raise NotImplementedError(f"{query.dtype}, {key.dtype}, {value.dtype}: expected one floating dtype")
    if scale is not None and scale <= 0:
        raise NotImplementedError(f"scale {scale}: the GPU kernel needs a scale above 0")
    if 0 in query.shape or 0 in key.shape:
        raise NotImplementedError(f"query {query.shape}, key {key.shape}: the GPU kernel needs some of each")
    if block_mask is not None:
        sizes = block_mask.query_size, block_mask.key_size
        count = tuple(pl.cdiv(x.shape[1], size) for x, size in zip((query, key), sizes, strict=True))
        if block_mask.blocks.shape != count or any(size % 128 for size in sizes):
            found = f"{block_mask.blocks.shape} blocks of {sizes} tokens"
            raise ValueError(f"block_mask has {found}: expected {count} and multiples of 128")


def _tiles(query: Array) -> _Tiles:
    return (_WIDE if query.dtype == jnp.float32 else _TILES)[query.shape[-1]]


def _call(
    kernel: Callable[..., None],
    tile: _Tile,
    arrays: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    block_axis: str,
    scale: float | None,
    ranges: KeyRanges | None,
    block_mask: BlockMask | None,
    interpret: bool,
) -> list[Array]:
    """Runs one program per head, example and block of `block_axis`: queries ("s") or keys ("r")."""
    b, s, n, k = arrays["query"].shape
    r = arrays["key"].shape[1]
    visits = list_visits(
        ranges,
        block_mask,
        queries=s,
        keys=r,
        query_block=tile.queries,
        key_block=tile.keys,
        of_keys=block_axis == "r",
    )
    if ranges is not None:
        low, high = ranges.limits
        arrays = arrays | {"codes": ranges.codes, "low": low, "high": high}
    arrays = arrays | ({} if visits is None else visits._asdict())
    blocks = {"s": tile.queries, "r": tile.keys}

    def spec(name: str, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """The program's block if `x` is an output, else the full axes, padded to whole blocks."""
        shape, index = [], []
        for axis, size in zip(_LAYOUTS[name], x.shape, strict=True):
            is_blocked = axis == block_axis and name in outputs
            block = blocks.get(axis, size)
            shape.append(None if axis in "bnvi" else block if is_blocked else pl.cdiv(size, block) * block)
            index.append("i" if is_blocked else axis if size > 1 else "")
        return pl.BlockSpec(
            tuple(shape),
            lambda i, j, e: tuple({"i": i, "n": j, "b": e, "v": e}.get(axis, 0) for axis in index),
        )

    rate = (k**-0.5 if scale is None else float(scale)) * math.log2(math.e)
    return pl.pallas_call(
        functools.partial(
            kernel, sizes=gpu_kernels.Sizes(s, r, tile.queries, tile.keys, rate, not interpret)
        ),
        grid=(pl.cdiv(s if block_axis == "s" else r, blocks[block_axis]), n, b),
        in_specs=[{name: spec(name, x) for name, x in arrays.items()}],
        out_specs=[spec(name, x) for name, x in outputs.items()],
        out_shape=list(outputs.values()),
        # A block's index in the list of visits is read one stage before the block.
        compiler_params=triton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages + (visits is not None)
        ),
        interpret=interpret,
        name=f"attention_{kernel.__name__}",
    )(arrays)
