"""Seconds from process start to the end of the first training step, with an empty and a filled compile cache.

    python benchmarks/startup.py [--config experiments/dit/sprites.py:demo] [--rounds 1]

Trains the DiT on the sprite world with this repository's VAE, in a separate process each time: `cold` starts
with an empty compilation cache (JAX_COMPILATION_CACHE_DIR), `warm` with the cache of the process before. The
last line is one JSON object: median seconds of each part, and `ratio` of warm to cold.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
VAE = ROOT / "experiments" / "weights" / "sprites_vae"
PARTS = ("import", "init", "trace", "compile", "step")


def start(path: str, started: float) -> None:
    """In a separate process: prints the seconds of each part as JSON."""
    seconds, last = {}, started

    def done(part: str) -> None:
        nonlocal last
        now = time.time()
        seconds[part], last = now - last, now

    import jax

    from vidgen.cli.overrides import load_config
    from vidgen.core.config import resolve
    from vidgen.data.buckets import training_clips
    from vidgen.data.loader import Loader
    from vidgen.data.sprites.source import SpritesData
    from vidgen.parallel.processes import global_batch
    from vidgen.train.experiment import Experiment
    from vidgen.train.phases import transformation
    from vidgen.train.state import FrozenState, init_state, place_frozen
    from vidgen.train.step import make_train_step
    from vidgen.train.trainer import step_options

    experiment = resolve(Experiment, load_config(path, [f"--config.task.vae={VAE}"]))
    assert isinstance(experiment.data, SpritesData)
    done("import")
    task, run, mesh = experiment.task, experiment.run, experiment.mesh.build()
    tx = transformation(task.phases, experiment.optimizer, run.num_steps)
    with (
        jax.set_mesh(mesh),
        Loader(training_clips(experiment.data), batch_size=run.batch_size, seed=run.seed) as loader,
    ):
        state, graphdef = init_state(task, tx, jax.random.key(run.seed), mesh)
        modules = {name: frozen.load() for name, frozen in task.frozen().items()}
        graphdefs, states = place_frozen(modules, mesh)
        frozen = FrozenState(modules=states)
        batch = global_batch(task.arrays(next(iter(loader))), mesh)
        jax.block_until_ready((state, batch))
        done("init")
        step = make_train_step(task, graphdef, graphdefs, tx, step_options(run))
        lowered = jax.jit(step).lower(state, frozen, batch)
        done("trace")
        compiled = lowered.compile()
        done("compile")
        jax.block_until_ready(compiled(state, frozen, batch))
        done("step")
    print(json.dumps(seconds))


def measure(path: str, cache: pathlib.Path) -> dict[str, float]:
    """Seconds by part and in total, from a new process with this compilation cache."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, __file__, "--config", path, "--started", repr(time.time())]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(result.stdout.splitlines()[-1])
    return {**seconds, "total": sum(seconds.values())}


def main() -> None:
    """Prints a row per process, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="experiments/dit/sprites.py:demo")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.started is not None:
        start(arguments.config, arguments.started)
        return
    rows: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name, measured in rows.items():
                measured.append(measure(arguments.config, pathlib.Path(cache)))
                shown = ", ".join(f"{part} {value:.1f} s" for part, value in measured[-1].items())
                print(f"{name}: {shown}", flush=True)
    median = {
        name: {part: statistics.median(row[part] for row in measured) for part in (*PARTS, "total")}
        for name, measured in rows.items()
    }
    ratio = median["warm"]["total"] / median["cold"]["total"]
    print(json.dumps({"config": arguments.config, "seconds": median, "ratio": ratio}))


if __name__ == "__main__":
    main()
