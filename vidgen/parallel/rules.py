"""The table from logical axis names to mesh axes, and the shardings derived from it."""

import difflib
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, PyTree

__all__ = [
    "RULES",
    "all_gather_fsdp",
    "batch_sharding",
    "constrain",
    "constrain_tree",
    "fsdp_is_sharded",
    "is_sharded",
    "partition_spec",
    "shardings",
]

RULES: dict[str, tuple[str, ...]] = {
    # Parameters: matrices are sharded over `fsdp` on the residual-stream side, over `tensor` on the other.
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "conv_in": ("fsdp",),
    "conv_out": (),  # In convolutions `tensor` shards the height of activations instead.
    "patch": (),
    "features": (),  # Features of another model or of a fixed embedding.
    "rank": (),  # Rank of a LoRA.
    # Activations. The batch takes `fsdp` first, so `embed` of an activation is not sharded.
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "time": (),
    "height": ("tensor",),
    "width": ("context",),
}
"""Mesh axes by logical axis name, in the order in which they shard a dimension."""


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The partition spec of an array with these logical axes.

    Each mesh axis shards at most one dimension: the first whose rule lists it and whose size it divides.
    Everything else is replicated.

    Raises:
      UserError: a name is not in `RULES`, or there is not one name per dimension.
    """
    if len(axes) != len(shape):
        raise UserError(f"an array of shape {tuple(shape)} has the logical axes {tuple(axes)}: one name each")
    used: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        parts = 1
        for axis in _rule(name):
            length = mesh.shape[axis]
            if axis not in used and length > 1 and size % (parts * length) == 0:
                chosen.append(axis)
                parts *= length
        used.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*entries)


def shardings(abstract_tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The sharding of every array in a tree: variables with `axes` metadata by `RULES`, others replicated.

    Args:
      abstract_tree: arrays or `jax.ShapeDtypeStruct`s, bare or in `nnx.Variable`s; may be optimizer state.
    """

    def of_variable(node):
        axes = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None

        def of_array(leaf):
            spec = partition_spec(axes, leaf.shape, mesh) if axes and leaf.ndim else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree.map(of_array, node)

    return jax.tree.map(of_variable, abstract_tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch along its first axis; the other dimensions are replicated."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: Array, *axes: str | None) -> Array:
    """`x` sharded by its logical axes over the mesh in context (`jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def constrain_tree(tree: PyTree) -> PyTree:
    """`tree` sharded by `shardings` over the mesh in context: keeps a state's initial sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def all_gather_fsdp(x: Array, *axes: str | None) -> Array:
    """A weight matrix with these logical axes, all-gathered over `fsdp`, which shards storage alone.

    Its gradient is reduce-scattered. Without the constraint the partitioner (jax 0.10) sometimes shards the
    contraction instead, and all-reduces activations.
    """
    if not fsdp_is_sharded():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    stored = partition_spec(axes, x.shape, mesh)
    used = PartitionSpec(*(None if entry == "fsdp" else entry for entry in stored))

    def to(spec: PartitionSpec):
        return lambda _, x: jax.lax.with_sharding_constraint(x, spec)

    # A bare sharding constraint would replicate the gradient as well.
    return jax.custom_derivatives.linear_call(to(used), to(stored), (), x)


def fsdp_is_sharded() -> bool:
    """Whether the mesh in context shards weights over `fsdp`, so that `all_gather_fsdp` has an effect."""
    return is_sharded("embed")


def is_sharded(name: str) -> bool:
    """Whether the mesh in context shards dimensions of this logical name whose size it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in _rule(name))


def _rule(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in RULES:
        nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
        raise UserError(
            f'unknown logical axis "{name}"; did you mean "{nearest}"? Known: {", ".join(sorted(RULES))} '
            "(vidgen/parallel/rules.py)"
        )
    return RULES[name]
