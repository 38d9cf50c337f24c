"""The attention kernels' cycles per tile of 1024 queries by 1024 keys, and the table of expected values.

Figures are for one core and for the whole jitted call, from `b s n k` to `b s n k` in bfloat16 with b = 1:
the kernels and the operations that XLA adds around them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..attention import tpu
from ..attention.masks import segment_ranges
from ..attention.specs import BlockSizes, Pass
from .generations import GENERATIONS
from .interior import Choice
from .measure import Job, measure
from .report import Hint, Report

__all__ = [
    "HEAD_DIMS",
    "PASSES",
    "TABLE",
    "Shape",
    "backward",
    "forward",
    "measure_passes",
    "row",
    "update_table",
]

PASSES: tuple[Pass, ...] = ("forward", "backward")
HEAD_DIMS = (64, 128)
TABLE = pathlib.Path(__file__).with_suffix(".json")
"""File with the cycles per tile of each pass by generation and head dim; `update_table` writes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a self-attention call.

    Attributes:
      sequence: number of queries and of keys.
      head_dim: channels of a head in queries, keys and values.
      heads: number of heads; by default as many as fill the 128 lanes of a register.
      segments: number of segments of equal length in the sequence; 1 is no packing.
    """

    sequence: int = 8192
    head_dim: int = 128
    heads: int = 0
    segments: int = 1

    def __post_init__(self):
        if not self.heads:
            object.__setattr__(self, "heads", max(1, 128 // self.head_dim))

    @property
    def tiles(self) -> float:
        """Number of visible tiles of 1024 by 1024 scores, over all heads."""
        return self.heads * (self.sequence / 1024) ** 2 / self.segments

    def hints(self, generation: str, blocks: BlockSizes | None = None) -> dict[str, Hint]:
        """Grid steps and outer blocks of the kernels, which for a packed row only the device computes.

        Raises:
          ValueError: segments are not multiples of the blocks.
        """
        hints, length = {}, self.sequence // self.segments
        for name in PASSES:
            tokens = jax.ShapeDtypeStruct((1, self.sequence, self.heads, self.head_dim), jnp.bfloat16)
            masked = self.segments > 1
            call = tpu.Call.of(tokens, tokens, name, masked=masked, generation=generation, blocks=blocks)
            sizes = call.blocks
            if self.segments > 1 and (length % max(sizes.queries, sizes.keys) or self.sequence % length):
                raise ValueError(f"{self}: segments must be of whole blocks, which are {sizes}")
            of_queries, of_keys = -(-length // sizes.queries), -(-length // sizes.keys)
            steps = self.segments * of_queries * of_keys * call.heads.groups
            # In the backward pass blocks of both sides start and end; the rarer side is counted too often.
            rows = of_queries if name == "forward" else max(of_queries, of_keys)
            rows *= self.segments * call.heads.groups
            # Under a mask, the forward kernel's first body handles the last step of an outer block.
            end = Choice(take=(0,)) if masked and name == "forward" else None
            hints[f"attention_{name}"] = Hint(steps=steps, rows=rows, choice=Choice(take="fewest"), end=end)
        return hints


def forward(
    *, generation: str, sequence: int, heads: int, head_dim: int, segments: int = 1, blocks: Any = None
) -> tuple[Any, Sequence[Any]]:
    """The forward pass as a function, and its abstract arguments."""

    def call(query: Any, key: Any, value: Any, segment_ids: Any = None) -> Any:
        ranges = None if segment_ids is None else segment_ranges(segment_ids, segment_ids)
        return tpu.forward(query, key, value, generation=generation, blocks=blocks, ranges=ranges)

    return call, [*[_tokens(sequence, heads, head_dim)] * 3, *_segments(sequence, segments)]


def backward(
    *, generation: str, sequence: int, heads: int, head_dim: int, segments: int = 1, blocks: Any = None
) -> tuple[Any, Sequence[Any]]:
    """The backward pass, from the forward pass's results, as a function, and its abstract arguments."""

    def call(
        query: Any,
        key: Any,
        value: Any,
        output: Any,
        log_sum_exp: Any,
        cotangent: Any,
        segment_ids: Any = None,
    ) -> Any:
        ranges = None if segment_ids is None else segment_ranges(segment_ids, segment_ids)
        inputs = (query, key, value, output, log_sum_exp, cotangent)
        return tpu.backward(*inputs, generation=generation, blocks=blocks, ranges=ranges)

    tokens = _tokens(sequence, heads, head_dim)
    sums = jax.ShapeDtypeStruct((1, heads, sequence), jnp.float32)
    return call, [tokens, tokens, tokens, tokens, sums, tokens, *_segments(sequence, segments)]


def _segments(sequence: int, segments: int) -> list[Any]:
    return [jax.ShapeDtypeStruct((1, sequence), jnp.int32)] if segments > 1 else []


def _tokens(sequence: int, heads: int, head_dim: int) -> Any:
    return jax.ShapeDtypeStruct((1, sequence, heads, head_dim), jnp.bfloat16)


def measure_passes(
    shape: Shape,
    *,
    generation: str,
    evaluate: bool = True,
    limit: float = 900.0,
    passes: Sequence[str] = PASSES,
) -> dict[str, Report]:
    """Reports by pass; the other arguments are those of `measure`."""
    keywords = {"generation": generation, **dataclasses.asdict(shape)}
    # The "least" branch skips the exact recomputation, which almost no input needs.
    hints = shape.hints(generation)
    jobs = [
        Job(build=f"{__name__}:{name}", keywords=keywords, hints=hints, branch="least") for name in passes
    ]
    reports = measure(jobs, generation=generation, evaluate=evaluate, limit=limit)
    return dict(zip(passes, reports, strict=True))


def row(report: Report, shape: Shape) -> dict[str, Any]:
    """The table entry of a pass.

    Returns:
      `cycles` per tile of the whole call, the `method` behind them, and `stall model`: cycles per tile of the
      kernels alone by the stall model, which runs for all generations. None stands for unknown.
    """
    per_tile = lambda cycles: None if cycles is None else round(cycles / shape.tiles, 1)  # noqa: E731
    return {
        "cycles": per_tile(report.cycles()),
        "method": report.method,
        "stall model": per_tile(report.kernel_cycles("stall model")),
    }


def update_table(limit: float = 900.0) -> dict[str, Any]:
    """Measures all generations and head dims, writes `TABLE` and returns it."""
    import libtpu

    table: dict[str, Any] = {"libtpu": libtpu.__version__, "sequence": Shape().sequence}
    for generation in GENERATIONS:
        table[generation] = {}
        for head_dim in HEAD_DIMS:
            shape = Shape(head_dim=head_dim)
            reports = measure_passes(shape, generation=generation, limit=limit)
            table[generation][str(head_dim)] = {name: row(reports[name], shape) for name in PASSES}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return table
