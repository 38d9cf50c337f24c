"""RMS norm and RoPE of queries and keys in one pass over memory: runs the TPU kernel, on a mesh or not."""

import jax
from jax.sharding import PartitionSpec

from vidgen.core.typing import Array, Float
from vidgen.ops.attention import Implementation
from vidgen.ops.attention_kernels import device_kind
from vidgen.pallas_kernels.qk_norm_rope import vjp
from vidgen.parallel.rules import partition_spec

__all__ = ["norm_rope"]


def norm_rope(
    x: Float[Array, "b s d"],
    scale: Float[Array, "d"],
    angles: Float[Array, "#b s k2"],
    *,
    eps: float,
    implementation: Implementation = "auto",
) -> Float[Array, "b s n k"]:
    """RMS norm over all heads with `scale`, then RoPE with `angles` per pair of channels; rounded once.

    Args:
      implementation: the attention implementation; `pallas_tpu`, or `auto` on TPUs, has a kernel here.

    Raises:
      NotImplementedError: another implementation or device; unsupported shapes or dtypes; channels sharded
        over the mesh. `nn.RMSNorm` followed by `nn.apply_rope` is the equivalent to fall back to.
    """
    platform, kind = device_kind()
    if implementation not in ("auto", "pallas_tpu") or (implementation == "auto" and platform != "tpu"):
        raise NotImplementedError(f"norm_rope: no kernel for implementation={implementation!r} on {kind}")

    def local(x: Array, scale: Array, angles: Array) -> Array:
        return vjp.norm_rope(x, scale, angles, eps=eps, interpret=platform == "cpu")

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not mesh.manual_axes:
        clips, tokens, channels = partition_spec(("batch", "tokens", "heads"), x.shape, mesh)
        if channels is not None:
            raise NotImplementedError("norm_rope: the channels of a token are sharded over several devices")
        spec = PartitionSpec(clips, tokens)
        of_angles = PartitionSpec(clips if angles.shape[0] > 1 else None, tokens)
        local = jax.shard_map(
            local,
            in_specs=(spec, PartitionSpec(), of_angles),
            out_specs=spec,
            check_vma=False,  # Kernels do not declare the mesh axes that their results vary over.
        )
    return local(x, scale, angles).reshape(*x.shape[:2], -1, 2 * angles.shape[-1])
