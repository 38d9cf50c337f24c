"""The attention kernels as one differentiable function, for use without vidgen."""

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
    """Softmax attention with its gradient; a query that sees nothing gives zeros and takes no gradient.

    XLA does not partition a kernel: on a mesh, call it in `shard_map`, each device with all keys of its
    queries.

    Args:
      query, key, value: `b s n k`, `b r n k`, `b r n k`, of the dtypes that the backend takes.
      scale: of the products, 1 / sqrt(k) by default; a Python number.
      ranges, block_mask: what is seen; both, where both are given. They get no gradient.
      backend: by default that of the first device.
      generation: of TPUs, as `specs.GENERATIONS` names them; by default that of the first device.
      interpret: runs on any device, slowly, to test.

    Returns:
      The mean of the values, `b s n k`.

    Raises:
      NotImplementedError: the kernels do not take such shapes or dtypes, or there are none for the device.
    """
    if backend is None:
        platform = jax.devices()[0].platform
        if platform not in ("tpu", "gpu", "cuda"):
            raise NotImplementedError(f"attention: no kernel for {platform}; name a backend to interpret it")
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
