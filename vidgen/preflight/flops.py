"""Counts the flops of a traced function's matrix products and convolutions."""

import math
from typing import Any

from jax.extend import core

__all__ = ["matmul_flops"]


def matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr | Any) -> float:
    """Flops of all matrix products and convolutions, over all devices; a multiply-add counts as two.

    The body of a `scan` counts once per iteration, unlike in XLA's own estimate; recomputation in the
    backward pass counts again; the body of a `shard_map` counts once per device. A `cond` counts its most
    expensive branch; if the branches are chosen by platform, the default branch. The body of a `while` counts
    once. A Pallas kernel with matrix products counts its cost estimate: attention as if nothing were masked.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "pallas_call" and equation.params.get("cost_estimate") is not None:
            products = sum(matmul_flops(inner) for inner in _inner(equation.params))
            total += equation.params["cost_estimate"].flops if products else 0
        elif name == "cond":
            total += max(matmul_flops(branch) for branch in _branches(equation))
        else:
            total += _times(equation) * sum(matmul_flops(inner) for inner in _inner(equation.params))
    return total


def _branches(equation: Any) -> list[Any]:
    branches = equation.params["branches"]
    platforms = equation.params.get("branches_platforms") or [None] * len(branches)
    default = [branch for branch, names in zip(branches, platforms, strict=True) if names is None]
    return default or list(branches)


def _times(equation: Any) -> int:
    """Number of times that an equation's inner jaxpr runs, over all devices."""
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        [axes] = [axes for name, axes in equation.params.items() if name.endswith("manual_axes")]
        return math.prod(mesh.shape[axis] for axis in axes)
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    output_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # Every output element sums over the taps and the input channels of its group. A dilated input, as in the
    # gradient of a strided convolution, is mostly zeros, which are not counted.
    dilation = math.prod(equation.params["lhs_dilation"])
    output = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * output * math.prod(kernel) / output_features / dilation


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, core.ClosedJaxpr | core.Jaxpr)]
