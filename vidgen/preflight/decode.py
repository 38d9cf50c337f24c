"""Compiles the decoding of a long video ahead of time: memory and flops on a TPU slice."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from vidgen.core import pixels
from vidgen.core.typing import Array, UInt8, Video
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import frame_mesh
from vidgen.parallel.rules import partition_spec, shardings
from vidgen.preflight.compile import TooLarge, compile_or_refusal, placed
from vidgen.preflight.flops import matmul_flops
from vidgen.preflight.hlo import count_collectives
from vidgen.preflight.report import Memory, lines
from vidgen.preflight.topology import chip_of

__all__ = ["DecodeReport", "compile_decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """A compiled decoder in numbers.

    Attributes:
      devices: number and kind of the devices.
      video: frames, height and width.
      latents: shape of the latents.
      memory: bytes per device; the outputs are the frames, uint8.
      collectives: instructions by kind; None if the program is too large.
      flops: over all devices, matrix products and convolutions only.
      least_seconds: for the whole video at the peak flop rate; a lower bound, not a prediction.
    """

    topology: str
    devices: str
    mesh: dict[str, int]
    video: tuple[int, int, int]
    latents: tuple[int, ...]
    memory: Memory
    collectives: dict[str, int] | None
    flops: float
    least_seconds: float | None
    compile_seconds: float

    @property
    def ok(self) -> bool:
        """Whether the program fits the devices' memory."""
        return self.memory.fits

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(dataclasses.asdict(self) | {"fits": self.memory.fits, "ok": self.ok})

    def table(self) -> str:
        """The report as a table."""
        frames, height, width = self.video
        rows = [
            ("devices", f"{self.topology}: {self.devices}"),
            ("mesh", ", ".join(f"{name}={size}" for name, size in self.mesh.items())),
            ("video", f"{frames} frames of {height} x {width}, from latents {list(self.latents)}"),
            *self.memory.rows(),
        ]
        if self.collectives is not None:
            counted = ", ".join(f"{number} {name}" for name, number in self.collectives.items())
            rows.append(("collectives", f"{counted} (instructions; in a loop once)"))
        rows.append(("flops", f"{self.flops:.3e}, matrix products and convolutions, all chips"))
        if self.least_seconds is not None:
            rows.append(("least time", f"{self.least_seconds:.1f} s at peak rate: a bound, not measured"))
        rows.append(("compiled in", f"{self.compile_seconds:.0f} s"))
        return lines(rows)


def compile_decode(
    config: VAEConfig, devices: Sequence[Any], video: tuple[int, int, int], topology: str
) -> DecodeReport:
    """Compiles `vidgen.models.video_vae.streaming.decode` of one video, its frames sharded over the devices.

    It allocates no array and computes nothing. Besides the latents and the decoded frames the program needs
    memory for the scan's carry, which does not grow with the number of frames.

    Args:
      devices: existing devices, or those of `topology_devices`.
      video: frames, height and width.
      topology: name of the devices in the report.

    Raises:
      UserError: the VAE does not support the size; names the nearest.
    """
    start = time.monotonic()
    latents_shape = (1, *config.latent_shape(*video))
    mesh = frame_mesh(len(devices), *latents_shape[2:4]).build(devices)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0))), graph=False)
    state = placed(state, shardings(state, mesh))
    spec = partition_spec(("batch", "time", "height", "width", None), latents_shape, mesh)
    latents = jax.ShapeDtypeStruct(latents_shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def decode(state: nnx.State, latents: Array) -> Array:
        return streaming.decode(nnx.merge(graphdef, state), latents, emit=_packed_colours)

    with jax.set_mesh(mesh):
        traced = jax.jit(decode).trace(state, latents)
        executable = compile_or_refusal(traced)
    chip, flops = chip_of(devices[0]), matmul_flops(traced.jaxpr)
    return DecodeReport(
        topology=topology,
        devices=f"{len(devices)} x {devices[0].device_kind}",
        mesh=dict(mesh.shape),
        video=video,
        latents=latents_shape,
        memory=Memory.read(executable, (state, latents), chip.hbm_bytes if chip else None),
        collectives=None
        if isinstance(executable, TooLarge)
        else count_collectives(executable.as_text() or ""),
        flops=flops,
        least_seconds=flops / len(devices) / chip.bf16_flops if chip else None,
        compile_seconds=time.monotonic() - start,
    )


def _packed_colours(video: Video) -> UInt8[Array, "b t h w3"]:
    """uint8 frames with width and colours in one axis: a TPU would pad a last dimension of 3 to 128."""
    return pixels.to_uint8(video).reshape(*video.shape[:3], -1)
