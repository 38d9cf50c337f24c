"""Attention on a GPU: the Pallas kernel, cuDNN through JAX, and PyTorch, relative to a matrix product.

    python benchmarks/attention_gpu.py [--rounds 5] [--shapes 1,32760,12,128 1,75600,40,128]
    python benchmarks/attention_gpu.py --preset tiny

Times forward, and forward plus backward, in bfloat16 at the sizes of Wan 2.1's models at 480p and 720p
(batch, tokens, heads, head dimension), for one video and for a packed row of 8. The Pallas kernel separates
packed videos by segment ids. The others get them as a batch, their best case, which videos of different
lengths would not allow. PyTorch's figure is that of its fastest backend. TFLOP/s count visible scores: 4
operations forward and 10 backward per channel; the ceiling is a large bfloat16 product on the same device.
Contenders take turns; figures are medians. First the kernel is compared with plain products and a softmax in
float32. `--preset tiny` is a smoke test on a CPU. The last line is one JSON object. Needs the `cuda` extra,
and PyTorch with CUDA for the comparison with it.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.pallas_kernels.attention import gpu, reference
from vidgen.pallas_kernels.attention.masks import segment_ranges

PRESETS = {
    "wan": ((1, 32760, 12, 128), (1, 75600, 40, 128)),
    "tiny": ((1, 256, 2, 64),),
}
SEGMENTS = {"wan": (1, 8), "tiny": (1, 2)}
PRODUCT = {"wan": 8192, "tiny": 256}
"""Rows and columns of the square matrices in the ceiling's product."""
FORWARD, BACKWARD = 4, 10
"""Operations per visible score and channel: 2 matrix products forward, 5 backward."""


class Case(NamedTuple):
    """Shape `b s n k` of queries, keys and values, with `segments` equal videos in each packed row."""

    b: int
    s: int
    n: int
    k: int
    segments: int = 1

    def operations(self, each: int) -> int:
        """Operations over all visible scores, with `each` per score and channel."""
        return each * self.b * self.n * self.s * (self.s // self.segments) * self.k

    def as_batch(self) -> tuple[int, int, int, int]:
        """Shape of the same tokens with one video per example."""
        return self.b * self.segments, self.s // self.segments, self.n, self.k


class Calls(NamedTuple):
    """Functions to time: `forward` and `both` start the work and return the argument of `wait`."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]


def pallas(case: Case, interpret: bool) -> Calls:
    """The Pallas kernel, with segment ids if a row holds several videos."""
    query, key, value, cotangent = _arrays(case, (case.b, case.s, case.n, case.k))
    ids = jnp.broadcast_to(jnp.arange(case.s)[None] // (case.s // case.segments), (case.b, case.s))
    ranges = segment_ranges(ids, ids) if case.segments > 1 else None
    run = functools.partial(gpu.forward, interpret=interpret)

    def both(query: Any, key: Any, value: Any, cotangent: Any, ranges: Any) -> Any:
        output, log_sum_exp = run(query, key, value, ranges=ranges)
        arrays = (query, key, value, output, log_sum_exp, cotangent)
        return output, gpu.backward(*arrays, ranges=ranges, interpret=interpret)

    forward, both = jax.jit(lambda q, k, v, r: run(q, k, v, ranges=r)), jax.jit(both)
    return Calls(
        lambda: forward(query, key, value, ranges),
        lambda: both(query, key, value, cotangent, ranges),
        jax.block_until_ready,
    )


def cudnn(case: Case, interpret: bool) -> Calls:
    """NVIDIA's fused kernel, through JAX."""
    if interpret:
        raise NotImplementedError("cuDNN needs a GPU")
    arrays = _arrays(case, case.as_batch())
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")

    def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        output, back = jax.vjp(attend, query, key, value)
        return output, back(cotangent)

    forward, both = jax.jit(attend), jax.jit(both)
    return Calls(lambda: forward(*arrays[:3]), lambda: both(*arrays), jax.block_until_ready)


def pytorch(case: Case, interpret: bool, backend: str) -> Calls:
    """One of the fused kernels of PyTorch's `scaled_dot_product_attention`."""
    del interpret
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        raise NotImplementedError("PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch has no CUDA device")
    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    # Tokens before heads in memory, as for the other contenders.
    arrays = [torch.randn(case.as_batch(), dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    query, key, value, cotangent = (x.transpose(1, 2) for x in arrays)
    query, key, value = (x.requires_grad_() for x in (query, key, value))

    def attend() -> Any:
        with sdpa_kernel(kinds[backend]):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def forward() -> Any:
        with torch.no_grad():
            return attend()

    def both() -> Any:
        return torch.autograd.grad(attend(), (query, key, value), cotangent)

    return Calls(forward, both, lambda _: torch.cuda.synchronize())


CONTENDERS: dict[str, Callable[[Case, bool], Calls]] = {
    "pallas": pallas,
    "cudnn": cudnn,
    **{
        f"pytorch_{kind}": functools.partial(pytorch, backend=kind)
        for kind in ("flash", "cudnn", "efficient")
    },
}


def seconds(runs: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]], rounds: int) -> dict[str, float]:
    """Median seconds per call of each run; runs take turns of about half a second."""
    counts, found = {}, {name: [] for name in runs}
    for name, (start, wait) in runs.items():
        wait(start())
        before = time.perf_counter()
        wait(start())
        counts[name] = max(1, min(100, int(0.5 / (time.perf_counter() - before))))
    for _ in range(rounds):
        for name, (start, wait) in runs.items():
            wait(start())
            before = time.perf_counter()
            for _ in range(counts[name]):
                last = start()
            wait(last)
            found[name].append((time.perf_counter() - before) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}


def measure(case: Case, interpret: bool, rounds: int) -> dict[str, dict[str, float]]:
    """TFLOP/s by contender and pass; prints why a contender cannot run."""
    calls = {}
    for name, make in CONTENDERS.items():
        try:
            made = make(case, interpret)
            made.wait(made.both())
        except (NotImplementedError, RuntimeError, ValueError) as error:
            print(f"  {name} is skipped: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            calls[name] = made
    forward = seconds({name: (x.forward, x.wait) for name, x in calls.items()}, rounds)
    both = seconds({name: (x.both, x.wait) for name, x in calls.items()}, rounds)
    found = {
        name: {
            "forward": case.operations(FORWARD) / forward[name] / 1e12,
            "forward_backward": case.operations(FORWARD + BACKWARD) / both[name] / 1e12,
        }
        for name in calls
    }
    backends = [found.pop(name) for name in list(found) if name.startswith("pytorch_")]
    if backends:
        found["pytorch"] = {kind: max(x[kind] for x in backends) for kind in backends[0]}
    return found


def ceiling(size: int, rounds: int) -> float:
    """TFLOP/s of a product of two square bfloat16 matrices with `size` rows."""
    left, right = (_random((size, size), seed) for seed in range(2))
    product = jax.jit(lambda x, y: x @ y)
    taken = seconds({"product": (lambda: product(left, right), jax.block_until_ready)}, rounds)
    return 2 * size**3 / taken["product"] / 1e12


def errors(interpret: bool, tokens: int) -> dict[str, float]:
    """Relative errors (L2) of the kernel's output and gradients, on two segments and a remainder."""
    case = Case(1, tokens, 2, 128, 2)
    query, key, value, cotangent = _arrays(case, (1, tokens, 2, 128))
    ids = jnp.arange(tokens)[None] // (tokens // 2)
    ranges = segment_ranges(ids, ids)

    def run(module: Any, arrays: tuple[Any, ...], **options: Any) -> Any:
        output, log_sum_exp = module.forward(*arrays[:3], ranges=ranges, **options)
        return output, *module.backward(*arrays[:3], output, log_sum_exp, arrays[3], ranges=ranges, **options)

    arrays = (query, key, value, cotangent)
    found = run(gpu, arrays, interpret=interpret)
    with jax.default_matmul_precision("highest"):
        expected = run(reference, tuple(x.astype(jnp.float32) for x in arrays))
    norms = [
        (np.linalg.norm(np.float64(a) - np.float64(b)), np.linalg.norm(np.float64(b)))
        for a, b in zip(found, expected, strict=True)
    ]
    names = ("output", "d_query", "d_key", "d_value")
    return {name: float(a / b) for name, (a, b) in zip(names, norms, strict=True)}


def _random(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _arrays(case: Case, shape: tuple[int, ...]) -> list[jax.Array]:
    """Query, key, value and cotangent; the numbers do not depend on `shape`."""
    return [_random((case.b, case.s, case.n, case.k), seed).reshape(shape) for seed in range(4)]


def main() -> None:
    """Prints figures per shape and number of segments, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="wan")
    parser.add_argument("--shapes", nargs="+", help="batch,tokens,heads,head dimension")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    interpret = jax.default_backend() not in ("gpu", "cuda")
    if interpret and arguments.preset != "tiny":
        parser.error(f"no GPU found (backend {jax.default_backend()}); use --preset tiny to run without one")
    shapes = PRESETS[arguments.preset]
    if arguments.shapes:
        shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shapes]
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "preset": arguments.preset}
    result["errors"] = errors(interpret, 300 if interpret else 3000)
    print("errors: " + ", ".join(f"{name} {x:.1e}" for name, x in result["errors"].items()), flush=True)
    result["ceiling_tflops"] = top = ceiling(PRODUCT[arguments.preset], arguments.rounds)
    print(f"{result['device']}: a bfloat16 product reaches {top:.4g} TFLOP/s", flush=True)
    result["tflops"] = {}
    for shape in shapes:
        for segments in SEGMENTS[arguments.preset]:
            label = f"{'x'.join(map(str, shape))}, segments {segments}"
            print(label, flush=True)
            found = measure(Case(*shape)._replace(segments=segments), interpret, arguments.rounds)
            for name, figures in found.items():
                parts = (f"{kind} {x:.4g} TFLOP/s ({x / top:.2f})" for kind, x in figures.items())
                print(f"  {name}: " + ", ".join(parts), flush=True)
            result["tflops"][label] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
