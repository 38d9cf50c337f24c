"""The device mesh: sizes of the axes that shard data, parameters, tokens and matrices."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from vidgen.core.errors import UserError

__all__ = ["AXES", "MeshOptions", "frame_mesh"]

AXES = ("data", "fsdp", "context", "tensor")
"""Mesh axes: data parallelism, fully sharded state, context (sequence) and tensor parallelism."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Size of each mesh axis; at most one may be -1, which takes all remaining devices."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def build(
        self,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> Mesh:
        """The mesh over `devices` (default: all devices of all processes), with automatic sharding.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self._sizes(len(devices))
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

    def _sizes(self, num_devices: int) -> tuple[int, ...]:
        sizes = {name: getattr(self, name) for name in AXES}
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise UserError(f"mesh ({shown}): sizes must be positive, and at most one may be -1")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if num_devices % fixed or (not free and fixed != num_devices):
            raise UserError(
                f"mesh ({shown}) needs {'a multiple of ' if free else ''}{fixed} devices, "
                f"found {num_devices}: change the sizes, or set one to -1 to take all remaining devices"
            )
        for name in free:
            sizes[name] = num_devices // fixed
        return tuple(sizes.values())


def frame_mesh(num_devices: int, height: int, width: int) -> MeshOptions:
    """The best mesh for the frames of one video: height sharded over `tensor`, width over `context`.

    Uses as many devices as divide the frame, with shards as nearly square as possible, because neighbours
    exchange the edges of a shard. Remaining devices go to `data` and hold replicas.

    Args:
      height, width: size of the latents.
    """
    shares = [
        MeshOptions(data=num_devices // (rows * columns), context=columns, tensor=rows)
        for rows in range(1, num_devices + 1)
        for columns in range(1, num_devices // rows + 1)
        if height % rows == 0 and width % columns == 0 and num_devices % (rows * columns) == 0
    ]
    return min(shares, key=lambda mesh: (mesh.data, height / mesh.tensor + width / mesh.context))
