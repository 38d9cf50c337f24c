"""A model and a loader so small that a run takes a second; also a program, for tests in subprocesses."""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.nn.variables import Buffer, ones, param, zeros
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.batch_spec import empty_batch, spec_of
from vidgen.train.loop import fit
from vidgen.train.optimizer import AdamW
from vidgen.train.options import RunOptions
from vidgen.train.task import Phase

DIM, HIDDEN = 12, 32


class Net(nnx.Module):
    def __init__(self, rngs):
        kernel = jax.nn.initializers.lecun_normal()
        self.norm = param(rngs, ones, (DIM,), (None,))
        self.up = param(rngs, kernel, (DIM, HIDDEN), ("embed", "mlp"))
        self.bias = param(rngs, zeros, (HIDDEN,), ("mlp",))
        self.down = param(rngs, kernel, (HIDDEN, DIM), ("mlp", "embed"))
        self.seen = Buffer(jnp.zeros(()))

    def __call__(self, x):
        hidden = jnp.tanh(x * self.norm[...][None] @ self.up[...] + self.bias[...][None])
        return hidden @ self.down[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyTask:
    """Denoises vectors of pixels; when `fragile`, a clip whose first pixel is 255 makes the loss infinite."""

    noise: float = 0.1
    fragile: bool = False

    def finish(self, model, *, step, workdir, open_clips, mesh):
        with (workdir / "finished.txt").open("a") as file:
            file.write(f"{step} {float(model.up[...].sum())}\n")

    def build(self, rngs):
        return Net(rngs)

    @property
    def phases(self):
        return (Phase(loss=self.loss),)

    def inference_model(self, model):
        return model

    def frozen(self):
        return {}

    def arrays(self, batch):
        return {"video": batch["video"]}

    def batch_spec(self, data, batch_size):
        return spec_of(self.arrays(empty_batch(data)), batch_size)

    def loss(self, context):
        model, batch = context.model, context.batch
        x = batch["video"].reshape(len(batch["video"]), DIM).astype(jnp.float32) / 127.5 - 1
        loss = jnp.square(model(x + self.noise * jax.random.normal(context.key, x.shape)) - x).mean()
        model.seen[...] = model.seen[...] + 1
        if self.fragile:
            loss = loss / jnp.all(batch["video"][:, 0, 0, 0, 0] < 255)
        return loss, {"mse": loss}


class ToyLoader:
    """Batch i is a function of i; process p of P gets its rows of it."""

    def __init__(self, batch_size, *, index=0, count=1, delay=0.0, bad_batch=None):
        self.rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self.batch_size, self.delay, self.bad_batch, self.next = batch_size, delay, bad_batch, 0

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.delay)
        shape = (self.batch_size, 1, 2, 2, 3)
        video = np.random.default_rng(self.next).integers(0, 255, shape, dtype=np.uint8)
        if self.next == self.bad_batch:
            video[3, 0, 0, 0, 0] = 255
        names = [f"clip-{self.next}-{row}" for row in range(self.batch_size)]
        self.next += 1
        return {"video": video[self.rows], "name": names[self.rows]}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def train(workdir, *, mesh=None, loader=None, task=None, evaluators=(), optimizer=None, **options):
    options = {"num_steps": 12, "batch_size": 8, "log_every": 1, "checkpoint_every": 4} | options
    return fit(
        task=task or ToyTask(),
        loader=loader or ToyLoader(options["batch_size"]),
        options=RunOptions(**options),
        optimizer=optimizer or AdamW(learning_rate=1e-2, warmup_steps=2),
        workdir=workdir,
        mesh=mesh or MeshOptions().build(jax.devices()[:1]),
        evaluators=evaluators,
        resume_with="toy again",
    )


def metrics(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [line["loss"] for line in metrics(workdir)]


def main(workdir, mesh, options):
    """Arguments: workdir, mesh sizes and run options as JSON; `delay` slows the loader down."""
    processes.initialize()
    mesh = MeshOptions(**json.loads(mesh)).build()
    options = json.loads(options)
    index, count = processes.row_shard(mesh)
    delay = options.pop("delay", 0.0)
    loader = ToyLoader(options.get("batch_size", 8), index=index, count=count, delay=delay)
    train(workdir, mesh=mesh, loader=loader, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
