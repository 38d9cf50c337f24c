"""Hardware parameters of TPU generations for the analysis of libtpu's listings."""

import dataclasses

__all__ = ["GENERATIONS", "Generation", "Multiply"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiply:
    """Cost of one matrix multiply instruction, by the dtype of its streamed operand.

    Attributes:
      cycles: cycles for which the instruction occupies its MXU.
      results: vector registers popped for its result.
    """

    cycles: int
    results: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Parameters of one TPU generation.

    Attributes:
      topology: name of the smallest slice that libtpu compiles for.
      cores: cores per chip; figures are for one core.
      macs: bfloat16 multiply-adds of a core per cycle.
      hbm_bytes: peak HBM bytes per cycle of a jax device; from Google Cloud's "System architecture" pages, at
        the clock for which `macs` give the peak stated there.
      delay_slots: bundles after a branch that are issued whether or not the branch is taken.
      latency: cycles from the end of a multiply until its result may be popped.
      multiplies: multiply instructions by dtype; "bf16" is the default for unlisted dtypes.
    """

    topology: str
    cores: int
    macs: int
    hbm_bytes: float
    delay_slots: int
    latency: int
    multiplies: dict[str, Multiply]


# MXUs of 128 x 128: 8 cycles for the 8 rows of a register, or 16 for bfloat16 with two rows packed in one.
_NARROW = {
    "f32": Multiply(cycles=8, results=1),
    "bf16": Multiply(cycles=16, results=2),
    "s8": Multiply(cycles=16, results=4),
}
# MXUs of 256 x 256: half the cycles, and results twice as wide.
_WIDE = {
    "f32": Multiply(cycles=4, results=2),
    "bf16": Multiply(cycles=8, results=4),
    "s8": Multiply(cycles=8, results=8),
    "f8": Multiply(cycles=8, results=8),
}

GENERATIONS: dict[str, Generation] = {
    "v5e": Generation(
        topology="v5e:2x2",
        cores=1,
        macs=65_536,
        hbm_bytes=545.0,
        delay_slots=4,
        latency=100,
        multiplies=_NARROW,
    ),
    "v5p": Generation(
        topology="v5p:2x2x1",
        cores=2,
        macs=65_536,
        hbm_bytes=1579.0,
        delay_slots=4,
        latency=100,
        multiplies=_NARROW,
    ),
    "v6e": Generation(
        topology="v6e:2x2",
        cores=1,
        macs=262_144,
        hbm_bytes=937.0,
        delay_slots=4,
        latency=100,
        multiplies=_WIDE,
    ),
    "tpu7x": Generation(
        topology="tpu7x:2x2x1",
        cores=2,
        macs=262_144,
        hbm_bytes=1677.0,
        delay_slots=6,
        latency=150,
        multiplies=_WIDE,
    ),
}
"""Generations by the prefix of their topology."""
