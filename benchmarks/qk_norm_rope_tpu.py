"""The fused RMS norm and RoPE kernel on TPUs against XLA's fusions, in static cycles; no TPU is needed.

    python benchmarks/qk_norm_rope_tpu.py [--generations v5e v5p v6e tpu7x] [--formulations kernel permuted]

Compiles bfloat16 programs for one device. Prints for each program the cycles of its schedule, its number of
operations, their HBM traffic, the least possible traffic, and the cycles that HBM takes for the latter.
Shapes are those of Wan 2.1's transformers: 1.3B with a clip of 81 frames of 480 x 832, and 14B with fewer
tokens.

- `written`: vidgen's RMSNorm and apply_rope.
- `permuted`: the partner of each number in its pair comes from a product with a permutation matrix; cosines
  and sines for all channels of a head are arguments. The fastest version found in plain jax.
- `kernel`: pallas_kernels/qk_norm_rope; its table is an argument.

Cycles are those of `pallas_kernels/tpu_static`: libtpu's evaluator, or where it does not run (tpu7x), a
kernel's bundles and, for other operations, the time of transferring their bytes; transfers by tpu7x's
SparseCores are left out. These are schedules, not measured times. The last line is one JSON object. Needs the
`tpu` extra.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vidgen.nn.embeddings import apply_rope
from vidgen.nn.norms import RMSNorm
from vidgen.pallas_kernels.qk_norm_rope.rotation import LANES, Rotation
from vidgen.pallas_kernels.qk_norm_rope.vjp import block_rows, norm_rope
from vidgen.pallas_kernels.tpu_static.generations import GENERATIONS
from vidgen.pallas_kernels.tpu_static.measure import Hint, Job, measure
from vidgen.pallas_kernels.tpu_static.report import Report

SHAPES = ((32760, 12, 128), (8192, 40, 128))
"""Tokens, heads, channels of a head."""
DIRECTIONS = ("forward", "backward")
SHARED_BY = {"v5p": 2}
"""Cores of a jax device that share a kernel's grid, by generation; 1 if absent."""


def written(x: Array, weight: Array, angles: Array, *, heads: int) -> Array:
    """Vidgen's RMSNorm and apply_rope."""
    graph, state = nnx.split(nnx.eval_shape(lambda: RMSNorm(x.shape[-1], rngs=nnx.Rngs(0))))
    y = nnx.merge(graph, jax.tree.map(lambda _: weight, state))(x)
    return apply_rope(y.reshape(*x.shape[:2], heads, -1), angles).reshape(x.shape)


def permuted(x: Array, weight: Array, cos: Array, sin: Array, *, heads: int) -> Array:
    """Takes partners by a matrix product, exact in bfloat16; `sin` is negative at the first of a pair."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * weight[None, None]
    y = y.astype(x.dtype).reshape(*x.shape[:2], heads, -1)
    swap = jnp.eye(y.shape[-1], dtype=x.dtype)[jnp.arange(y.shape[-1]) ^ 1]
    partners = jnp.einsum("bsnk,kj->bsnj", y, swap, preferred_element_type=jnp.float32)
    turned = y.astype(jnp.float32) * cos[:, :, None] + partners * sin[:, :, None]
    return turned.astype(x.dtype).reshape(x.shape)


def fused(x: Array, weight: Array, table: Array, *, heads: int) -> Array:
    """The Pallas kernel."""
    return norm_rope(x, weight, Rotation(table=table, head_dim=x.shape[-1] // heads))


FUNCTIONS: dict[str, Callable[..., Array]] = {"written": written, "permuted": permuted, "kernel": fused}


def build(formulation: str, direction: str, tokens: int, heads: int, head_dim: int) -> Any:
    """A function and its abstract arguments: the `build` of a `Job`."""
    of = jax.ShapeDtypeStruct
    x, weight = of((1, tokens, heads * head_dim), jnp.bfloat16), of((heads * head_dim,), jnp.float32)
    widths = {
        "written": [head_dim // 2],
        "permuted": [head_dim] * 2,
        "kernel": [LANES if head_dim <= LANES else 2 * LANES],
    }
    tables = [of((1, tokens, width), jnp.float32) for width in widths[formulation]]
    function = functools.partial(FUNCTIONS[formulation], heads=heads)
    if direction == "forward":
        return function, (x, weight, *tables)

    def gradients(cotangent: Array, x: Array, weight: Array, *tables: Array) -> Any:
        return jax.vjp(lambda x, weight: function(x, weight, *tables), x, weight)[1](cotangent)

    return gradients, (x, x, weight, *tables)


def job(generation: str, shape: tuple[int, int, int], direction: str, formulation: str) -> Job:
    """One program to measure."""
    tokens, heads, head_dim = shape
    x = jax.ShapeDtypeStruct((1, tokens, heads * head_dim), jnp.bfloat16)
    rows = block_rows(x) * SHARED_BY.get(generation, 1)
    return Job(
        build=f"{__file__}:build",
        keywords={
            "formulation": formulation,
            "direction": direction,
            "tokens": tokens,
            "heads": heads,
            "head_dim": head_dim,
        },
        hints={".*": Hint(steps=-(-tokens // rows))},
    )


def figures(report: Report) -> dict[str, Any]:
    """Figures of one program: cycles, operations, HBM traffic and the method."""
    parts = [part.instruction for part in (*report.kernels, *report.operations)]
    if report.failure or not parts:
        return {"failure": report.failure or "no operation could be read"}
    return {
        "cycles": report.cycles(),
        "operations": sum(part.count for part in parts),
        "megabytes": round(sum(part.count * part.traffic for part in parts) / 1e6, 1),
        "method": "stall model" if report.unevaluated else report.method,
    }


def main() -> None:
    """Prints a row per generation, shape, direction and formulation, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=list(GENERATIONS))
    parser.add_argument("--formulations", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    options = parser.parse_args()
    cases = [(shape, d, f) for shape in SHAPES for d in DIRECTIONS for f in options.formulations]
    result: dict[str, dict[str, Any]] = {}
    for generation in options.generations:
        reports = measure([job(generation, *case) for case in cases], generation=generation)
        for ((s, n, k), direction, formulation), report in zip(cases, reports, strict=True):
            arrays = 2 if direction == "forward" else 3  # x, the result's cotangent, and the output.
            least = s * (arrays * 2 * n * k + 4 * k)
            row = figures(report)
            row["least_cycles"] = round(least / GENERATIONS[generation].hbm_bytes)
            row["least_megabytes"] = round(least / 1e6, 1)
            name = f"{s}x{n}x{k} {direction} {formulation}"
            result.setdefault(generation, {})[name] = row
            print(
                f"{generation} {name}: " + ", ".join(f"{value} {key}" for key, value in row.items()),
                flush=True,
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
