"""Names, sizes and bytes of the arrays in a pytree."""

import math
from typing import Any

import jax

from vidgen.core.typing import PyTree

__all__ = ["count", "named_leaves", "num_bytes"]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves of `tree` by dotted path, in tree order: `{"blocks.attention.q.kernel": array, ...}`.

    Works for dicts, sequences, dataclass pytrees, `nnx.State` and `nnx.Module`. The trailing `value` of an
    `nnx.Variable` is omitted.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_dotted(path): leaf for path, leaf in leaves}


def count(tree: PyTree) -> int:
    """Number of elements in the arrays of `tree`; shapes suffice (`jax.ShapeDtypeStruct`)."""
    return sum(math.prod(leaf.shape) for leaf in _arrays(tree))


def num_bytes(tree: PyTree) -> int:
    """Total bytes of the arrays of `tree`, unsharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree))


def _arrays(tree: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]


def _dotted(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")
