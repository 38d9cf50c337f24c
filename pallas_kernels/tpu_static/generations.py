"""TPU generations as their compiler's listings show them."""

import dataclasses

__all__ = ["GENERATIONS", "Generation", "Multiply"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiply:
    """One matrix multiply instruction, by the type of what it streams.

    Attributes:
      cycles: for which it occupies its MXU.
      results: vector registers that are popped for it.
    """

    cycles: int
    results: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One TPU generation.

    Attributes:
      topology: the smallest slice that libtpu compiles for.
      cores: per chip; figures are of one core.
      macs: bfloat16 multiply-adds of a core per cycle.
      hbm_bytes: that a jax device moves from or to HBM per cycle at most; from Google Cloud's "System
        architecture" pages, with the clock at which `macs` make up the peak that they name.
      delay_slots: bundles after a branch that are issued whether or not it is taken.
      latency: cycles from the end of a multiply until its result may be popped.
      multiplies: by type; "bf16" stands for those that are not named.
    """

    topology: str
    cores: int
    macs: int
    hbm_bytes: float
    delay_slots: int
    latency: int
    multiplies: dict[str, Multiply]


# MXUs of 128 x 128 that take 8 rows of a register in 8 cycles, two rows in one of bfloat16.
_NARROW = {
    "f32": Multiply(cycles=8, results=1),
    "bf16": Multiply(cycles=16, results=2),
    "s8": Multiply(cycles=16, results=4),
}
# MXUs of 256 x 256: half the time, and results twice as wide.
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
"""By the name that begins a topology."""
