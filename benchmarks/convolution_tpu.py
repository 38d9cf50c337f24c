"""Formulations of the causal 3D convolution on TPUs in cycles estimated by the compiler; no TPU is needed.

    python benchmarks/convolution_tpu.py [--topologies v5e:2x2 v5p:2x2x1 v6e:2x2]

Each program is two 3x3x3 convolutions in bfloat16 with the VAE's norm and SiLU before each, as in a residual
block, for one device; shapes are those of decoding 4 frames of 1080p on 8 chips with Wan 2.1's VAE. The
figure is the sum of `estimated_cycles` over the compiled program's instructions: the compiler's model of the
schedule, not a measured time. `ideal` is the number of multiply-adds over the matrix units' multiply-adds per
cycle. Then follows upsampling, a 3x3 convolution of pixels repeated 2 x 2: `repeated` in that form, `dilated`
as vidgen computes it. The last line is one JSON object. Needs the `tpu` extra (libtpu).
"""

import argparse
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from vidgen.preflight.topology import prepare_environment, topology_devices

prepare_environment()  # Before anything imports jax.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from vidgen.core.typing import Array  # noqa: E402
from vidgen.ops.convolution import upsampled_conv3d  # noqa: E402
from vidgen.ops.convolution_cpu import convolve_upsampled  # noqa: E402

PADDING = ((2, 0), (1, 1), (1, 1))
SHAPES = ((1, 135, 30, 384), (4, 540, 120, 192), (4, 1080, 240, 96))
"""Frames, height, width, channels of one device's shard."""
TAPS = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
MACS_PER_CYCLE = {"v5e": 65_536, "v5p": 131_072, "v6e": 262_144}
"""bfloat16 multiply-adds per cycle of one device; on a v5p that is two cores, which run one program."""


def native(x: Array, kernel: Array) -> Array:
    """XLA's own 3D convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), PADDING, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _in_2d(frames: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        frames, kernel, (1, 1), PADDING[1:], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def taps_as_channels(x: Array, kernel: Array) -> Array:
    """A 2D convolution of three frames stacked as channels."""
    _, t, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), PADDING[0], (0, 0), (0, 0), (0, 0)))
    stacked = jnp.concatenate([x[:, i : i + t] for i in range(3)], axis=-1)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * c, -1)
    return _in_2d(stacked.reshape(-1, h, w, 3 * c), kernel).reshape(x.shape[0], t, h, w, -1)


def sum_over_time(x: Array, kernel: Array) -> Array:
    """Sum of three 2D convolutions, one per tap over time."""
    b, t, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), PADDING[0], (0, 0), (0, 0), (0, 0)))
    parts = [_in_2d(x[:, i : i + t].reshape(-1, h, w, c), kernel[i]) for i in range(3)]
    return functools.reduce(jnp.add, parts).reshape(b, t, h, w, -1)


def shifted(x: Array, kernel: Array) -> Array:
    """Sum of 27 matrix products of shifted inputs."""
    _, t, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), *PADDING, (0, 0)))
    products = (x[:, i : i + t, j : j + h, k : k + w] @ kernel[i, j, k] for i, j, k in TAPS)
    return functools.reduce(jnp.add, products)


FORMULATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "native": native,
    "taps_as_channels": taps_as_channels,
    "sum_over_time": sum_over_time,
    "shifted": shifted,
}


def repeated(x: Array, kernel: Array) -> Array:
    """Repeats the pixels 2 x 2, then convolves."""
    b, t, h, w, c = x.shape
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3).reshape(b * t, 2 * h, 2 * w, c)
    return _in_2d(x, kernel[0]).reshape(b, t, 2 * h, 2 * w, -1)


def added(x: Array, kernel: Array) -> Array:
    """The CPU formulation: four outputs per pixel as channels, weights on copies of a pixel summed."""
    return convolve_upsampled(x, kernel, ((0, 0), (1, 1), (1, 1)))


STEPS_UP = ((2, 270, 60, 384), (4, 540, 120, 192))
"""Frames, height, width, input channels of one device's shard; there are half as many output channels."""
UPSAMPLED: dict[str, Callable[[Array, Array], Array]] = {
    "repeated": repeated,
    "added": added,
    "dilated": upsampled_conv3d,
}


def cycles(device: Any, program: Callable[..., Array], *shapes: tuple[int, ...]) -> int:
    """Estimated cycles of a program with bfloat16 arguments of the given shapes."""
    sharding = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    text = jax.jit(program).lower(*arguments).compile().as_text() or ""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def block(convolve: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Two convolutions, each after the VAE's norm and SiLU."""

    def run(x: Array, kernels: Array) -> Array:
        for index in range(2):
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)
            x = convolve(jax.nn.silu(y).astype(x.dtype), kernels[index])
        return x

    return run


def main() -> None:
    """Prints a row per generation, shape and formulation, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    result: dict[str, dict[str, dict[str, int]]] = {}
    for topology in parser.parse_args().topologies:
        generation = topology.split(":")[0]
        device = topology_devices(topology)[0]
        rate = MACS_PER_CYCLE[generation]
        rows = result.setdefault(generation, {})
        for t, h, w, c in SHAPES:
            found = {"ideal": t * h * w * 27 * c * c // rate}
            for name, convolve in FORMULATIONS.items():
                found[name] = cycles(device, block(convolve), (1, t, h, w, c), (2, 3, 3, 3, c, c)) // 2
            rows[f"{t}x{h}x{w}x{c}"] = found
        for t, h, w, c in STEPS_UP:
            found = {"ideal": t * h * w * 36 * c * (c // 2) // rate}
            for name, convolve in UPSAMPLED.items():
                found[name] = cycles(device, convolve, (1, t, h, w, c), (1, 3, 3, c, c // 2))
            rows[f"{t}x{h}x{w}x{c} up"] = found
        for label, found in rows.items():
            print(f"{generation} {label}: " + ", ".join(f"{n} {v:,}" for n, v in found.items()), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
