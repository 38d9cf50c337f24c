"""The attention kernels as one differentiable function, usable without vidgen."""

import functools
from typing import Any, Literal

import jax
from jax import Array

from . import gpu, tpu
from .masks import BlockMask, KeyRanges

__all__ = ["attention"]

Backend = Literal["tpu", "gpu"]


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    ranges: KeyRanges | None = None,
    block_mask: BlockMask | None = None,
    backend: Backend | None = None,
    generation: str | None = None,
    interpret: Any = False,
) -> Array:
    """Differentiable softmax attention; a query that sees no key gives zeros and gets zero gradient.

    XLA does not partition a kernel: on a mesh, call this inside `shard_map`, with all keys of a device's
    queries on that device.

    Args:
      query, key, value: `b s n k`, `b r n k`, `b r n k`, of a dtype that the backend supports.
      scale: factor on the query-key products, 1 / sqrt(k) by default; a Python number.
      ranges, block_mask: masks without gradients; a query sees a key if both allow it.
      backend: by default that of the first device.
      generation: TPU generation, a key of `specs.GENERATIONS`; by default that of the first device.
      interpret: interprets the kernels on any device: slow, for tests.

    Returns:
      The weighted mean of the values, `b s n k`.

    Raises:
      NotImplementedError: unsupported shapes or dtypes, or no kernels for the device.
    """
    if backend is None:
        platform = jax.devices()[0].platform
        if platform not in ("tpu", "gpu", "cuda"):
            raise NotImplementedError(
                f'attention: no kernel for {platform}; pass backend="tpu" or "gpu" with interpret=True'
            )
        backend = "tpu" if platform == "tpu" else "gpu"
    options: dict[str, Any] = {"scale": scale, "interpret": interpret}
    if backend == "tpu":
        options["generation"] = generation
    return _attention(query, key, value, (ranges, block_mask), backend, tuple(options.items()))


Masks = tuple[KeyRanges | None, BlockMask | None]
Options = tuple[tuple[str, Any], ...]


def _kernels(backend: Backend, masks: Masks, options: Options) -> tuple[Any, Any]:
    module, named = (tpu if backend == "tpu" else gpu), dict(options)
    seen = {"ranges": masks[0], "block_mask": masks[1]}
    return functools.partial(module.forward, **seen, **named), functools.partial(
        module.backward, **seen, **named
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: Array, key: Array, value: Array, masks: Masks, backend: Backend, options: Options
) -> Array:
    forward, _ = _kernels(backend, masks, options)
    return forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array, masks: Masks, backend: Backend, options: Options):
    forward, _ = _kernels(backend, masks, options)
    output, log_sum_exp = forward(query, key, value)
    return output, (query, key, value, masks, output, log_sum_exp)


def _backward(backend: Backend, options: Options, saved: tuple[Any, ...], cotangent: Array):
    query, key, value, masks, output, log_sum_exp = saved
    _, backward = _kernels(backend, masks, options)
    return *backward(query, key, value, output, log_sum_exp, cotangent), None


_attention.defvjp(_forward, _backward)
