"""GFLOP/s of formulations of the causal 3D convolution on this device, forward and forward + backward.

    python benchmarks/convolution.py

Formulations take turns. The last line is one JSON object: median GFLOP/s by shape and formulation, and the
ratio of the formulation in vidgen/ops/convolution.py to XLA's native one.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vidgen.core.typing import Array
from vidgen.ops.convolution import conv3d

PADDING = ((2, 0), (1, 1), (1, 1))
SHAPES = ((16, 32), (32, 16), (32, 32), (64, 8), (64, 16), (96, 64), (192, 32))
TAPS = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]


def native(x: Array, kernel: Array) -> Array:
    """XLA's own 3D convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), PADDING, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def shifted(x: Array, kernel: Array) -> Array:
    """Sum of 27 matrix products of shifted inputs."""
    _, t, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), *PADDING, (0, 0)))
    products = (x[:, i : i + t, j : j + h, k : k + w] @ kernel[i, j, k] for i, j, k in TAPS)
    return functools.reduce(jnp.add, products)


def im2col(x: Array, kernel: Array) -> Array:
    """One matrix product with all 27 neighbours stacked as channels."""
    _, t, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), *PADDING, (0, 0)))
    columns = jnp.concatenate([x[:, i : i + t, j : j + h, k : k + w] for i, j, k in TAPS], axis=-1)
    return columns @ kernel.reshape(27 * c, -1)


FORMULATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "native": native,
    "vidgen": lambda x, kernel: conv3d(x, kernel, padding=PADDING),
    "shifted": shifted,
    "im2col": im2col,
}


def measure(channels: int, side: int, rounds: int) -> dict[str, tuple[float, float]]:
    """GFLOP/s (forward, forward + backward) of each formulation; formulations take turns."""
    x = jnp.ones((8, 5, side, side, channels))
    kernel = jnp.full((3, 3, 3, channels, channels), 0.01)
    operations = 2 * 27 * channels**2 * 8 * 5 * side**2
    programs = {}
    for name, convolve in FORMULATIONS.items():
        loss = lambda x, kernel, convolve=convolve: jnp.square(convolve(x, kernel)).sum()  # noqa: E731
        programs[name, 0] = jax.jit(convolve)
        programs[name, 1] = jax.jit(jax.grad(loss, argnums=(0, 1)))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for program in programs.values():
        jax.block_until_ready(program(x, kernel))
    for _ in range(rounds):
        for key, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, kernel))
            times[key].append(time.perf_counter() - start)
    seconds = {key: statistics.median(values) for key, values in times.items()}
    return {
        name: (operations / seconds[name, 0] / 1e9, 3 * operations / seconds[name, 1] / 1e9)
        for name in FORMULATIONS
    }


def main() -> None:
    """Prints a row per shape and formulation, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    result = {}
    for channels, side in SHAPES:
        found = measure(channels, side, rounds)
        for name, (forward, both) in found.items():
            print(
                f"{channels:3d} channels, {side:2d} x {side:2d}  {name:8s} {forward:6.1f} {both:6.1f} GFLOP/s"
            )
        pairs = zip(found["vidgen"], found["native"], strict=True)
        ratios = [vidgen_rate / native_rate for vidgen_rate, native_rate in pairs]
        result[f"{channels}x{side}"] = {"gflops": found, "ratio_to_native": ratios}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
