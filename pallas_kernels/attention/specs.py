"""Block sizes per TPU generation, and the generations' properties."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, Literal, cast

__all__ = ["GENERATIONS", "BlockSizes", "Generation", "Pass", "block_sizes", "generation_of"]

Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Properties of one core of a TPU generation.

    Attributes:
      kind: prefix of jax's `device_kind`.
      vmem_bytes: VMEM that a kernel may use, somewhat less than the core has.
      wide_mxu: whether the MXU is 256 x 256 rather than 128 x 128; heads of 128 channels leave a wide one
        half empty unless products are transposed.
    """

    kind: str
    vmem_bytes: int
    wide_mxu: bool


GENERATIONS: dict[str, Generation] = {
    "v5e": Generation(kind="TPU v5 lite", vmem_bytes=100 << 20, wide_mxu=False),
    "v5p": Generation(kind="TPU v5", vmem_bytes=60 << 20, wide_mxu=False),
    "v6e": Generation(kind="TPU v6 lite", vmem_bytes=100 << 20, wide_mxu=True),
    "tpu7x": Generation(kind="TPU7x", vmem_bytes=56 << 20, wide_mxu=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Block sizes of one pass.

    Attributes:
      queries, keys: tokens of a block, which one grid step computes; multiples of the next two.
      query_unit, key_unit: tokens of a pipeline unit within a block; multiples of 128.
      ahead, lag: arguments of `pipeline.pipelined`.
      heads: most heads per block, or pairs of heads with 64 channels; the kernel takes the largest divisor of
        the number of heads up to this.
    """

    queries: int
    keys: int
    query_unit: int
    key_unit: int
    ahead: int = 1
    lag: int = 1
    heads: int = 1

    def __post_init__(self):
        for block, unit in ((self.queries, self.query_unit), (self.keys, self.key_unit)):
            if unit % 128 or block % unit:
                raise ValueError(f"{self}: units must be multiples of 128, and blocks multiples of units")

    def units(self, heads: int) -> list[tuple[int, slice, slice]]:
        """(head, query slice, key slice) of each unit of a block."""
        return [
            (head, slice(q, q + self.query_unit), slice(k, k + self.key_unit))
            for head in range(heads)
            for q in range(0, self.queries, self.query_unit)
            for k in range(0, self.keys, self.key_unit)
        ]

    def within(self, queries: int, keys: int) -> "BlockSizes":
        """These sizes, reduced to fit sequences of `queries` and `keys` tokens."""
        return dataclasses.replace(
            self,
            queries=(q := _fit(self.queries, queries)),
            keys=(k := _fit(self.keys, keys)),
            query_unit=_divisor(self.query_unit, q),
            key_unit=_divisor(self.key_unit, k),
        )

    def dividing(self, queries: int | None, keys: int | None) -> "BlockSizes":
        """These sizes, reduced to divide a mask's blocks of `queries` and `keys` tokens."""
        q = self.queries if queries is None else _divisor(self.queries, queries)
        k = self.keys if keys is None else _divisor(self.keys, keys)
        return dataclasses.replace(
            self,
            queries=q,
            keys=k,
            query_unit=_divisor(self.query_unit, q),
            key_unit=_divisor(self.key_unit, k),
        )


def generation_of(device_kind: str) -> str:
    """The generation's name for jax's `device_kind`.

    Raises:
      NotImplementedError: the device is no TPU, or a TPU without an entry in `GENERATIONS`.
    """
    found = [name for name, one in GENERATIONS.items() if device_kind.startswith(one.kind)]
    if not found:
        raise NotImplementedError(f"attention: no TPU kernel for the device {device_kind!r}")
    return max(found, key=lambda name: len(GENERATIONS[name].kind))


def block_sizes(generation: str, which: Pass, *, head_dim: int, bits: int, masked: bool) -> BlockSizes:
    """The best sizes that `python -m vidgen.pallas_kernels.attention.tune` found.

    Args:
      generation: a key of `GENERATIONS`.
      head_dim: 64 or a multiple of 128, at most 256.
      bits: bits per element of the inputs.
      masked: whether there are key ranges (segments and the like), where smaller blocks skip more.
    """
    return BlockSizes(**_table()[generation][which][entry(head_dim, bits, masked)])


def entry(head_dim: int, bits: int, masked: bool) -> str:
    """The key of an entry of the table."""
    if bits == 32:
        return "float32"
    return f"{head_dim}{' masked' if masked else ''}"


@functools.cache
def _table() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(pathlib.Path(__file__).with_name("block_sizes.json").read_text()))


def _fit(size: int, length: int) -> int:
    """The size, among `size` and its halves, with the least work in tokens (padding included) and grid steps.

    A grid step costs about as much as 128 tokens.
    """
    whole = -(-length // 128) * 128
    if whole <= size:
        return whole
    sizes = [size]
    while sizes[-1] % 256 == 0:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda one: -(-length // one) * (one + 128))


def _divisor(size: int, of: int) -> int:
    """The largest multiple of 128 that divides `of` and is at most `size`."""
    return next(n for n in range(min(size, of) // 128 * 128, 0, -128) if of % n == 0)
