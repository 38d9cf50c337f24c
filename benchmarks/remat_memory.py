"""TPU memory of a training step of the DiT, by remat policy.

    pip install -e ".[tpu]"
    python benchmarks/remat_memory.py [--topology v5e:4x4] [--variant wan2.1-t2v-1.3b] [--video 49x256x448]
        [--batch 16] [--context 1] [--tensor 1] [--sequence auto]
        [--policies none dots attention full offload]

libtpu compiles the real step (loss, gradients, AdamW, EMA) on latents and text features, in bfloat16; no TPU
is needed. Devices beyond `context` and `tensor` go to `fsdp`. Per chip: `saved` is the memory of a step in
excess of its arguments, `peak` all memory, `host` the part in host memory. `work` is the FLOPs of the step's
matrix products relative to the first policy in the table. The compiler refuses a program that is too large:
`peak` is then the size in its message. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import math
import time
from typing import Any, get_args

from vidgen.preflight.topology import GIB, prepare_environment, topology_devices

prepare_environment()  # Before jax is imported.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from vidgen.core import rng  # noqa: E402
from vidgen.core.streams import TEXT, Stream  # noqa: E402
from vidgen.core.tokens import Tokens, patchify  # noqa: E402
from vidgen.diffusion.rectified_flow import velocity_loss  # noqa: E402
from vidgen.models.dit.config import VARIANTS, DiTConfig  # noqa: E402
from vidgen.models.dit.model import DiT  # noqa: E402
from vidgen.nn.embeddings import grid_positions  # noqa: E402
from vidgen.nn.stack import Remat  # noqa: E402
from vidgen.ops.sequence_parallel import SequenceParallel  # noqa: E402
from vidgen.parallel.mesh import MeshOptions  # noqa: E402
from vidgen.parallel.rules import batch_sharding  # noqa: E402
from vidgen.preflight.compile import TooLarge, compile_or_refusal, placed  # noqa: E402
from vidgen.preflight.flops import matmul_flops  # noqa: E402
from vidgen.preflight.report import Memory  # noqa: E402
from vidgen.preflight.topology import chip_of  # noqa: E402
from vidgen.train.optimizer import AdamW  # noqa: E402
from vidgen.train.phases import transformation  # noqa: E402
from vidgen.train.state import FrozenState, abstract_state  # noqa: E402
from vidgen.train.step import StepOptions, make_train_step  # noqa: E402
from vidgen.train.task import Phase  # noqa: E402

TEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """Training task of the transformer alone; a batch holds latents and text features."""

    dit: DiTConfig

    def build(self, rngs):
        return DiT(self.dit, rngs=rngs)

    @property
    def phases(self):
        return (Phase(loss=self.loss),)

    def loss(self, context):
        model, batch, key = context.model, context.batch, context.key
        grid = self.dit.token_grid(*batch["latents"].shape[1:4])
        tokens = Tokens(patchify(batch["latents"], self.dit.patch_size), grid_positions(*grid)[None])
        noise = jax.random.normal(rng.stream(key, "noise"), tokens.patches.shape)
        timestep = jax.random.uniform(rng.stream(key, "timestep"), (len(noise), 1))
        streams = {TEXT: Stream(batch["text"])}
        losses, _ = velocity_loss(lambda x, t: model(x, t, streams)[0], tokens, noise, timestep)
        return losses.mean(), {}


def measure(dit: DiTConfig, mesh, latents: tuple[int, ...]) -> tuple[Memory, int | None, float, float]:
    """Memory of a chip, bytes on its host (None if refused), FLOPs of a step, and seconds to compile."""
    start = time.monotonic()
    task: Any = Velocity(dit=dit)
    tx = transformation(task.phases, AdamW(), 1000)
    state, graphdef = abstract_state(task, tx, mesh)
    batch = {
        "latents": jax.ShapeDtypeStruct(latents, jnp.float32),
        "text": jax.ShapeDtypeStruct((latents[0], TEXT_TOKENS, dit.text_dim), jnp.float32),
    }
    batch = placed(batch, dict.fromkeys(batch, batch_sharding(mesh)))
    step: Any = make_train_step(task, graphdef, {}, tx, StepOptions(), None)
    with jax.set_mesh(mesh):
        traced = step.trace(state, FrozenState(), batch)
        executable = compile_or_refusal(traced)
    chip = chip_of(mesh.devices.flat[0])
    memory = Memory.read(executable, (state, None, batch), chip.hbm_bytes if chip else None)
    host = None
    if not isinstance(executable, TooLarge):
        found: Any = executable.memory_analysis()
        host = found.host_temp_size_in_bytes
    return memory, host, matmul_flops(traced.jaxpr), time.monotonic() - start


def main() -> None:
    """Prints a row per policy and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--variant", default="wan2.1-t2v-1.3b", choices=VARIANTS)
    parser.add_argument("--video", default="49x256x448", help="frames, height and width in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sequence", default="auto", choices=["auto", "gather", "ulysses", "ring"])
    parser.add_argument("--policies", nargs="+", default=get_args(Remat), choices=get_args(Remat))
    arguments = parser.parse_args()
    devices = topology_devices(arguments.topology)
    mesh = MeshOptions(data=1, fsdp=-1, context=arguments.context, tensor=arguments.tensor).build(devices)
    frames, height, width = map(int, arguments.video.split("x"))
    base = dataclasses.replace(VARIANTS[arguments.variant], dtype="bfloat16")
    base = dataclasses.replace(base, sequence=SequenceParallel(method=arguments.sequence))
    latents = (arguments.batch, 1 + (frames - 1) // 4, height // 8, width // 8, base.in_channels)
    tokens = math.prod(base.token_grid(*latents[1:4]))
    print(f"{arguments.variant}, {arguments.batch} clips of {tokens} tokens")
    print(", ".join(f"{name}={size}" for name, size in mesh.shape.items()) + f", {arguments.sequence}")
    print(f"{'policy':<10} {'saved':>10} {'peak':>10} {'host':>10} {'work':>6}   GiB per chip")
    rows, least = {}, None
    for policy in sorted(arguments.policies, key=get_args(Remat).index):
        memory, host, flops, seconds = measure(dataclasses.replace(base, remat=policy), mesh, latents)
        least = flops if least is None else least
        rows[policy] = {
            "saved_bytes": memory.temporaries,
            "peak_bytes": memory.peak,
            "host_bytes": host,
            "fits": memory.fits,
            "flops": flops,
            "work": flops / least,
            "compile_seconds": round(seconds),
        }
        shown = [_gib(memory.temporaries), _gib(memory.peak), _gib(host)]
        note = "" if memory.fits else f"does not fit into {_gib(memory.available)}"
        print(
            f"{policy:<10} {shown[0]:>10} {shown[1]:>10} {shown[2]:>10} {flops / least:>6.2f}   {note}",
            flush=True,
        )
    settings = {name: value for name, value in vars(arguments).items() if name != "policies"}
    print(json.dumps({**settings, "tokens": tokens, "policies": rows}))


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.3f}"


if __name__ == "__main__":
    main()
