"""TPU slices that need not exist: their devices as jax describes them, with memory and peak flop rate."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import MutableMapping
from typing import Any

from vidgen.core.errors import UserError

__all__ = ["CHIPS", "Chip", "PreflightError", "chip_of", "prepare_environment", "topology_devices"]

GIB = 2**30


class PreflightError(UserError):
    """A step cannot be compiled on this machine; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a TPU generation, as jax counts devices.

    Attributes:
      kind: jax's `device_kind`.
      hbm_bytes: memory that a program may use, from the compiler's out-of-memory error (libtpu 0.0.42); a
        little less than the data sheet's.
      bf16_flops: peak flops per second, from Google Cloud's "System architecture" pages.
    """

    kind: str
    hbm_bytes: int
    bf16_flops: float


CHIPS: dict[str, Chip] = {
    "v5e": Chip(kind="TPU v5 lite", hbm_bytes=int(15.75 * GIB), bf16_flops=197e12),
    "v5p": Chip(kind="TPU v5", hbm_bytes=int(95.74 * GIB), bf16_flops=459e12),
    "v6e": Chip(kind="TPU v6 lite", hbm_bytes=int(31.25 * GIB), bf16_flops=918e12),
    # A chip has two cores, and each is a device: half of the chip's 192 GiB and 2307 Tflop/s.
    "tpu7x": Chip(kind="TPU7x", hbm_bytes=int(94.75 * GIB), bf16_flops=1153.5e12),
}
"""Devices by the generation name at the start of a topology."""


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the environment variables for compiling without a TPU; call it before jax is imported."""
    environment["JAX_PLATFORMS"] = "cpu"
    environment["TPU_SKIP_MDS_QUERY"] = "1"  # Skips the query of the metadata server.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    environment.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # A cached program has no memory statistics.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice such as "v5e:4x4" or "v5p:2x2x4"; they need not exist.

    Raises:
      PreflightError: libtpu is not installed, or has no such slice.
    """
    known = ", ".join(CHIPS)
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+(x\d+)?", name):
        raise PreflightError(
            f'--topology={name}: expected a generation ({known}) and the shape of a slice, as "v5e:4x4" or '
            '"v5p:2x2x4"'
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PreflightError(
            'libtpu, which holds the compiler for TPUs, is not installed: pip install "vidgen[tpu]" '
            "(x86-64 Linux; no TPU is needed)"
        )
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises several types, all with a readable message.
        raise PreflightError(f"--topology={name} is no slice that libtpu knows: {error}") from error


def chip_of(device: Any) -> Chip | None:
    """The entry of a device in `CHIPS`; None for other devices (CPUs)."""
    return next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)
