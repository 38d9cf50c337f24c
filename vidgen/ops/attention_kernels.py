"""Runs an attention kernel (`pallas_kernels` or `Blocks`) per device under `shard_map`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Float
from vidgen.ops.attention_blocks import ATTENTION, AttentionKernel
from vidgen.ops.attention_cpu import Masks
from vidgen.pallas_kernels.attention import gpu, tpu
from vidgen.pallas_kernels.attention.masks import HIDDEN, KeyRanges, segment_ranges
from vidgen.pallas_kernels.attention.specs import generation_of
from vidgen.parallel.rules import partition_spec

__all__ = ["Kernels", "device_kind", "kernel_attention", "key_ranges", "over_mesh"]

_PADDING = 2**30
"""Code of segment 0, the padding at the end of a packed row: nondecreasing codes skip the most blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """The Pallas kernels of one device kind; same contract as `vidgen.pallas_kernels.attention.reference`.

    Attributes:
      kind: `pallas_tpu` or `pallas_gpu`.
      generation: TPU generation, a key of `vidgen.pallas_kernels.attention.specs.GENERATIONS`.
      interpret: interprets the kernels on a CPU: slow, for tests.
    """

    kind: Literal["pallas_tpu", "pallas_gpu"]
    generation: str | None = None
    interpret: bool = False

    @classmethod
    def of(cls, kind: Literal["pallas_tpu", "pallas_gpu"]) -> "Kernels":
        """Kernels for the devices in use; interpreted on CPUs.

        Raises:
          NotImplementedError: this kind has no kernels for the devices in use.
        """
        platform, name = device_kind()
        if kind == "pallas_gpu":
            if platform not in ("cpu", "gpu", "cuda"):
                raise NotImplementedError(f"attention: pallas_gpu on {name}")
            return cls(kind=kind, interpret=platform == "cpu")
        if platform == "cpu":
            return cls(kind=kind, generation="v6e", interpret=True)
        return cls(kind=kind, generation=generation_of(name))

    def forward(
        self, query: Array, key: Array, value: Array, *, scale: float, ranges: KeyRanges | None
    ) -> tuple[Array, Array]:
        """Returns the output, `b s n k`, and the log-sum-exp, `b n s`."""
        inputs = (query, key, value)
        return self._module.forward(*inputs, scale=scale, ranges=ranges, **self._options)

    def backward(
        self,
        query: Array,
        key: Array,
        value: Array,
        output: Array,
        log_sum_exp: Array,
        cotangent: Array,
        *,
        scale: float,
        ranges: KeyRanges | None,
    ) -> tuple[Array, Array, Array]:
        """Gradients of query, key and value."""
        inputs = (query, key, value, output, log_sum_exp, cotangent)
        return self._module.backward(*inputs, scale=scale, ranges=ranges, **self._options)

    @property
    def _module(self) -> Any:
        return tpu if self.kind == "pallas_tpu" else gpu

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"interpret": self.interpret}
        return options if self.generation is None else {**options, "generation": self.generation}


def device_kind() -> tuple[str, str]:
    """Platform and device kind of the mesh in context, or of `jax.devices()[0]` without one."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform or "cpu", described.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind


def key_ranges(masks: Masks, query: Float[Array, "b s n k"]) -> KeyRanges | None:
    """`masks` as the kernels' key ranges; None if every query sees every key."""
    if masks.query_segments is not None and masks.key_segments is not None:
        segments = (masks.query_segments, masks.key_segments)
        query_codes, key_codes = (jnp.where(x == 0, _PADDING, x) for x in segments)
        return segment_ranges(query_codes, key_codes, masks.keys)
    if masks.keys is None:
        return None
    zeros = jnp.zeros(query.shape[:2], jnp.int32)
    return KeyRanges(jnp.where(masks.keys, 0, HIDDEN), zeros, zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def kernel_attention(
    query: Float[Array, "b s n k"],
    key: Float[Array, "b r n k"],
    value: Float[Array, "b r n k"],
    masks: Masks,
    scale: float,
    kernels: AttentionKernel,
) -> Float[Array, "b s n k"]:
    """Softmax attention, sharded over the mesh in context; zeros for a query that sees no key.

    Raises:
      NotImplementedError: the kernels do not support these shapes or dtypes.
    """
    return _forward(query, key, value, masks, scale, kernels)[0]


def _forward(
    query: Array, key: Array, value: Array, masks: Masks, scale: float, kernels: AttentionKernel
) -> tuple[Array, Any]:
    def local(_, query, key, value, masks):
        ranges = key_ranges(masks, query)
        output, log_sum_exp = kernels.forward(query, key, value, scale=scale, ranges=ranges)
        return output.astype(value.dtype), log_sum_exp.swapaxes(1, 2)

    inputs = (query, key, value, masks)
    results = checkpoint_name(over_mesh(local, *inputs, outputs="qq"), ATTENTION)
    return results[0], (inputs, results)


def _backward(scale: float, kernels: AttentionKernel, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    inputs, results = residuals

    def local(axes, query, key, value, masks, output, log_sum_exp, cotangent):
        d_query, *rest = kernels.backward(
            *(query, key, value, output, log_sum_exp.swapaxes(1, 2), cotangent),
            scale=scale,
            ranges=key_ranges(masks, query),
        )
        # Devices with other queries of the same clips and heads hold the same keys: sum their gradients.
        gradients = d_query, *(rest if axes is None else jax.lax.psum(rest, axes))
        return tuple(grad.astype(x.dtype) for grad, x in zip(gradients, (query, key, value), strict=True))

    return *over_mesh(local, *inputs, *results, cotangent, outputs="qkk"), None


kernel_attention.defvjp(_forward, _backward)


def over_mesh(
    local: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    masks: Masks,
    *others: Any,
    outputs: str,
) -> Any:
    """Runs `local` per device under `shard_map`, because XLA partitions neither loops nor kernels.

    Clips and heads of all arrays are sharded; tokens of queries are sharded, keys hold all tokens.

    Args:
      local: called with the mesh axes that shard query tokens (None if none do), then a shard of each array.
      others: arrays sharded as `query`.
      outputs: one letter per output: `q` if it is sharded as `query`, `k` as `key`; a single output comes
        without a tuple.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return local(None, query, key, value, masks, *others)
    clips, tokens, heads, _ = partition_spec(("batch", "tokens", "heads", None), query.shape, mesh)
    of_queries, of_keys = PartitionSpec(clips, tokens, heads), PartitionSpec(clips, None, heads)
    of_masks = Masks(PartitionSpec(clips), PartitionSpec(clips, tokens), PartitionSpec(clips))  # pyright: ignore
    out_specs = tuple({"q": of_queries, "k": of_keys}[letter] for letter in outputs)
    return jax.shard_map(
        functools.partial(local, tokens),
        in_specs=(of_queries, of_keys, of_keys, of_masks, *[of_queries] * len(others)),
        out_specs=out_specs if len(outputs) > 1 else out_specs[0],
        check_vma=False,
    )(query, key, value, masks, *others)
