"""Runs an attention kernel (`pallas_kernels` or `Blocks`) per device under `shard_map`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Float
from vidgen.ops.attention_blocks import ATTENTION, AttentionKernel
from vidgen.ops.key_ranges import KeyRanges
from vidgen.pallas_kernels.attention import gpu, tpu
from vidgen.pallas_kernels.attention.specs import generation_of
from vidgen.parallel.rules import partition_spec

__all__ = ["Kernels", "device_kind", "kernel_attention", "over_mesh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """The Pallas kernels of one device kind; same contract as `vidgen.pallas_kernels.attention.reference`.

    Attributes:
      kind: `pallas_tpu` or `pallas_gpu`.
      forward, backward: functions of that kind's module for the devices in use.
    """

    kind: Literal["pallas_tpu", "pallas_gpu"]
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]

    @classmethod
    def of(cls, kind: Literal["pallas_tpu", "pallas_gpu"]) -> "Kernels":
        """Kernels for the devices in use; interpreted on CPUs, which is slow, for tests.

        Raises:
          NotImplementedError: this kind has no kernels for the devices in use.
        """
        platform, name = device_kind()
        options: dict[str, Any] = {"interpret": platform == "cpu"}
        if kind == "pallas_tpu":
            options["generation"] = "v6e" if platform == "cpu" else generation_of(name)
        elif platform not in ("cpu", "gpu", "cuda"):
            raise NotImplementedError(f"attention: pallas_gpu on {name}")
        module = tpu if kind == "pallas_tpu" else gpu
        bind = functools.partial
        return cls(
            kind=kind, forward=bind(module.forward, **options), backward=bind(module.backward, **options)
        )


def device_kind() -> tuple[str, str]:
    """Platform and device kind of the mesh in context, or of `jax.devices()[0]` without one."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform or "cpu", described.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def kernel_attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    ranges: KeyRanges | None,
    scale: float,
    kernel: AttentionKernel,
) -> Float[Array, "b s n k"]:
    """Softmax attention, sharded over the mesh in context; zeros for a query that sees no key.

    Raises:
      NotImplementedError: the kernel does not support these shapes or dtypes.
    """
    inputs = (query, key, value, ranges)
    return over_mesh(functools.partial(_forward_shard, scale, kernel), inputs, outputs="qq")(*inputs)[0]


def _forward_shard(
    scale: float,
    kernel: AttentionKernel,
    _: Any,
    query: Array,
    key: Array,
    value: Array,
    ranges: KeyRanges | None,
) -> tuple[Array, Array]:
    output, log_sum_exp = kernel.forward(query, key, value, scale=scale, ranges=ranges)
    return output.astype(value.dtype), log_sum_exp.swapaxes(1, 2)


def _forward(
    query: Array, key: Array, value: Array, ranges: KeyRanges | None, scale: float, kernel: AttentionKernel
) -> tuple[Array, Any]:
    inputs = (query, key, value, ranges)
    run = over_mesh(functools.partial(_forward_shard, scale, kernel), inputs, outputs="qq")
    results = checkpoint_name(run(*inputs), ATTENTION)
    return results[0], (inputs, results)


def _backward(scale: float, kernel: AttentionKernel, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    inputs, results = residuals

    def local(axes, query, key, value, ranges, output, log_sum_exp, cotangent):
        saved = (output, log_sum_exp.swapaxes(1, 2), cotangent)
        d_query, *rest = kernel.backward(query, key, value, *saved, scale=scale, ranges=ranges)
        # Devices with other queries of the same clips and heads hold the same keys: sum their gradients.
        gradients = d_query, *(rest if axes is None else jax.lax.psum(rest, axes))
        return tuple(grad.astype(x.dtype) for grad, x in zip(gradients, (query, key, value), strict=True))

    arrays = (*inputs, *results, cotangent)
    return *over_mesh(local, arrays, outputs="qkk")(*arrays), None


kernel_attention.defvjp(_forward, _backward)


def over_mesh(local: Callable[..., Any], arrays: tuple[Any, ...], *, outputs: str) -> Callable[..., Any]:
    """A function that runs `local` per device under `shard_map`: XLA partitions neither loops nor kernels.

    Clips and heads of all arrays are sharded; tokens of queries are sharded, keys hold all tokens.

    Args:
      local: called with the mesh axes that shard query tokens (None if none do), then a shard of each array.
      arrays: arrays that the function will be called with: query, key, value, key ranges or None, and others
        that are sharded as the query.
      outputs: one letter per output: `q` if it is sharded as the query, `k` as the key; a single output comes
        without a tuple.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return functools.partial(local, None)
    query, _, _, ranges, *others = arrays
    clips, tokens, heads, _ = partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    of_queries, of_keys = PartitionSpec(clips, tokens, heads), PartitionSpec(clips, None, heads)
    of_ranges: Any = PartitionSpec()
    if ranges is not None:
        of_ranges = KeyRanges._make((PartitionSpec(clips), *[PartitionSpec(clips, tokens)] * 2))
    out_specs = tuple({"q": of_queries, "k": of_keys}[letter] for letter in outputs)
    return jax.shard_map(
        functools.partial(local, tokens),
        in_specs=(of_queries, of_keys, of_keys, of_ranges, *[of_queries] * len(others)),
        out_specs=out_specs if len(outputs) > 1 else out_specs[0],
        check_vma=False,
    )
