"""Attention on TPUs in static cycles: vidgen's kernels, jax's and tokamax's splash attention, without a TPU.

    python benchmarks/attention_tpu.py [--generations v5e v5p v6e tpu7x] [--sequences 8192 32768]
        [--head-dims 128 64] [--passes forward backward] [--evaluated 8192]

Cycles are for one core per tile of 1024 queries by 1024 keys, of full attention in bfloat16 with a batch of
one and as many heads as fill 128 lanes, by `pallas_kernels/tpu_static`: libtpu's evaluator, and a stall model
of the kernels' bundles. They are schedules, not measured times; differences under 3 to 5 % mean nothing.

- `kernel`: the Pallas kernels alone.
- `call`: the whole jitted call from `b s n k` to `b s n k`, with the operations that XLA adds: for the others
  transposes and the scaling of queries, the product of output and gradient, sums of partial gradients.

The others use the best of a few block sizes by the stall model (`SWEEPS`). Their backward pass is the
gradient without the kernel of the forward pass. If the evaluator does not run, or skips a kernel's body as
with jax's (its mask reads as zero), its column is empty. `ratio` is vidgen's cycles of the call over those of
the better of the others, by the evaluator if all have it, else by the stall model. The evaluator's time grows
with the square of the sequence: beyond `--evaluated` tokens it does not run, and an operation that XLA adds
counts as the transfer of its bytes. The last line is one JSON object. Needs the `tpu` extra (libtpu), and
tokamax (`pip install tokamax`) for its rows.
"""

import argparse
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vidgen.pallas_kernels.tpu_static.attention import PASSES, Shape
from vidgen.pallas_kernels.tpu_static.generations import GENERATIONS
from vidgen.pallas_kernels.tpu_static.measure import Job, measure
from vidgen.pallas_kernels.tpu_static.report import Report

OURS, JAX, TOKAMAX = "vidgen", "jax", "tokamax"
SWEEPS: dict[tuple[str, str], list[list[int]]] = {
    (JAX, "forward"): [
        [1024, 2048, 1024],
        [2048, 2048, 1024],
        [2048, 4096, 1024],
        [512, 4096, 1024],
    ],
    (TOKAMAX, "forward"): [
        [2048, 2048, 512, 1],
        [2048, 4096, 512, 1],
        [1024, 4096, 1024, 1],
        [512, 8192, 1024, 0],
        [512, 8192, 1024, 1],
    ],
    (JAX, "backward"): [[1024, 2048, 512], [2048, 1024, 512], [2048, 2048, 512]],
    (TOKAMAX, "backward"): [[1024, 2048, 512, 0], [2048, 1024, 512, 0], [2048, 2048, 512, 0]],
}
"""Queries and keys per block, and keys per inner step; for tokamax also `use_experimental_scheduler`."""


def splash(direction: str, blocks: Sequence[int], heads: int, sequence: int) -> Callable[..., Any]:
    """Splash attention kernel of jax, `n s k` to `n s k`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys, at_a_time = blocks
    if direction == "forward":
        sizes = kernels.BlockSizes(block_q=queries, block_kv=keys, block_kv_compute=at_a_time)
    else:
        sizes = kernels.BlockSizes(
            block_q=512,
            block_kv=512,
            block_kv_compute=512,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=at_a_time,
            use_fused_bwd_kernel=True,
        )
    mask = masks.MultiHeadMask([masks.FullMask((sequence, sequence))] * heads)
    return kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)


def tokamax_splash(direction: str, blocks: Sequence[int], heads: int, sequence: int) -> Callable[..., Any]:
    """Splash attention kernel of tokamax, `n s k` to `n s k`."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as kernels,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    del heads  # All heads share one mask.
    queries, keys, at_a_time, scheduler = blocks
    if direction == "forward":
        config = kernels.SplashConfig(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=at_a_time,
            use_experimental_scheduler=bool(scheduler),
        )
    else:
        config = kernels.SplashConfig(
            block_q=512,
            block_kv=512,
            block_kv_compute=512,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=at_a_time,
            use_experimental_scheduler=bool(scheduler),
            dq_reduction_steps=3 if sequence // keys > 3 else None,
        )
    mask = masks.FullMask((sequence, sequence))
    return kernels.make_splash_mha(mask, config=config, q_seq_shards=1)


def other(
    *, name: str, direction: str, blocks: Sequence[int], sequence: int, head_dim: int, heads: int
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """A pass of another implementation from `b s n k` to `b s n k`, and its abstract arguments."""
    make = {JAX: splash, TOKAMAX: tokamax_splash}[name]
    kernel = make(direction, blocks, heads, sequence)

    def attend(query: Array, key: Array, value: Array) -> Array:
        query, key, value = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
        return jax.vmap(lambda *x: kernel(*x))(query, key, value).swapaxes(1, 2)

    def gradients(query: Array, key: Array, value: Array, cotangent: Array) -> Any:
        return jax.vjp(attend, query, key, value)[1](cotangent)

    tokens = jax.ShapeDtypeStruct((1, sequence, heads, head_dim), jnp.bfloat16)
    return (attend, [tokens] * 3) if direction == "forward" else (gradients, [tokens] * 4)


def job_of_other(name: str, direction: str, blocks: Sequence[int], shape: Shape) -> Job:
    """The `Job` of another implementation's pass."""
    keywords = {"name": name, "direction": direction, "blocks": list(blocks)}
    sizes = {"sequence": shape.sequence, "head_dim": shape.head_dim, "heads": shape.heads}
    return Job(build=f"{pathlib.Path(__file__).resolve()}:other", keywords=keywords | sizes)


def job_of_ours(direction: str, shape: Shape, generation: str) -> Job:
    """The `Job` of vidgen's pass, without the exact recomputation, which almost no input needs."""
    sizes = {"sequence": shape.sequence, "head_dim": shape.head_dim, "heads": shape.heads}
    build = f"vidgen.pallas_kernels.tpu_static.attention:{direction}"
    return Job(build=build, keywords=sizes | {"generation": generation}, branch="least")


def of_pass(report: Report, direction: str) -> Report:
    """The report of one pass: a backward pass without the forward kernel that the gradient runs first."""
    return report if direction == "forward" else report.without(r"splash_mha_fwd.*")


def best_blocks(names: Iterable[str], direction: str, shape: Shape, generation: str) -> dict[str, list[int]]:
    """Best blocks of the other implementations by the stall model; those that do not compile are left out."""
    tried = [(name, blocks) for name in names for blocks in SWEEPS[name, direction]]
    jobs = [job_of_other(name, direction, blocks, shape) for name, blocks in tried]
    best: dict[str, tuple[int, list[int]]] = {}
    for (name, blocks), report in zip(
        tried, measure(jobs, generation=generation, evaluate=False), strict=True
    ):
        cycles = of_pass(report, direction).kernel_cycles("stall model")
        if cycles is None:
            print(f"{generation} {name} {direction} {blocks}: {report.failure[:200]}", flush=True)
        elif name not in best or cycles < best[name][0]:
            best[name] = cycles, blocks
    return {name: blocks for name, (_, blocks) in best.items()}


def figures(report: Report, shape: Shape) -> dict[str, float | None]:
    """Cycles per tile of the kernels and of the call, by evaluator and stall model."""
    per_tile = lambda cycles: None if cycles is None else round(cycles / shape.tiles, 1)  # noqa: E731
    result = {}
    for method in ("evaluator", "stall model"):
        result[f"kernel, {method}"] = per_tile(report.kernel_cycles(method))
        result[f"call, {method}"] = per_tile(report.cycles(method))
    return result


def compare(
    blocks: dict[str, list[int]], direction: str, shape: Shape, generation: str, evaluate: bool
) -> dict[str, Any]:
    """Figures of all implementations for one shape, and the ratio."""
    jobs = [job_of_ours(direction, shape, generation)]
    jobs += [job_of_other(name, direction, sizes, shape) for name, sizes in blocks.items()]
    rows: dict[str, Any] = {}
    reports = measure(jobs, generation=generation, evaluate=evaluate)
    for name, report in zip([OURS, *blocks], reports, strict=True):
        rows[name] = figures(of_pass(report, direction), shape) | {"blocks": blocks.get(name)}
        if report.failure:
            print(f"{generation} {name} {direction}: {report.failure[:200]}", flush=True)
    for method in ("evaluator", "stall model"):
        calls = {name: found[f"call, {method}"] for name, found in rows.items()}
        if OURS in calls and len(calls) > 1 and None not in calls.values():
            ratio = calls[OURS] / min(cycles for name, cycles in calls.items() if name != OURS)
            return {"rows": rows, "ratio": round(ratio, 3), "method": method}
    return {"rows": rows, "ratio": None, "method": None}


def print_rows(label: str, found: dict[str, Any]) -> None:
    """Prints one line per implementation."""
    show = lambda cycles: f"{'-' if cycles is None else f'{cycles:,.0f}':>9}"  # noqa: E731
    print(f"\n{label}: {'kernel':>28}{'call':>19}")
    print(f"{'':16}{'evaluator':>12}{'stalls':>9}{'evaluator':>12}{'stalls':>9}  blocks")
    for name, cycles in found["rows"].items():
        kernel, call = (
            f"   {show(cycles[f'{part}, evaluator'])}{show(cycles[f'{part}, stall model'])}"
            for part in ("kernel", "call")
        )
        print(f"  {name:14}{kernel}{call}  {cycles['blocks'] or 'from its table'}")
    if found["ratio"] is not None:
        print(f"  ratio {found['ratio']:.3f} ({found['method']})", flush=True)


def main() -> None:
    """Prints a table for each generation, sequence, head dim and pass, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=GENERATIONS)
    parser.add_argument("--sequences", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--evaluated", type=int, default=8192, help="longest sequence for the evaluator")
    options = parser.parse_args()
    others = [JAX, TOKAMAX]
    if importlib.util.find_spec("tokamax") is None:
        print("tokamax is not installed: its rows are skipped (pip install tokamax)")
        others.remove(TOKAMAX)
    result: dict[str, Any] = {}
    for generation in options.generations:
        for head_dim in options.head_dims:
            for direction in options.passes:
                first = Shape(sequence=min(options.sequences), head_dim=head_dim)
                blocks = best_blocks(others, direction, first, generation)
                for sequence in options.sequences:
                    shape = Shape(sequence=sequence, head_dim=head_dim)
                    evaluate = sequence <= options.evaluated
                    found = compare(blocks, direction, shape, generation, evaluate)
                    label = f"{generation} s={sequence} k={head_dim} {direction}"
                    print_rows(label, found)
                    result[label] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
