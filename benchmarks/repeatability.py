"""Checks that programs from the compilation cache give the same bits as freshly compiled ones.

    python benchmarks/repeatability.py [--processes 3] [--samples 5] [--load 6] [--preset tiny]

Trains the transformer on the sprite world for a few steps and samples from it, many times, each in a separate
process: without a compilation cache; with one that stores all programs; with one that stores programs that
took over a second to compile (JAX's default); on all cores and on one; idle and beside `--load` busy
processes, also with programs that were cached under load. Each process samples the same prompts `--samples`
times. Compares digests of all pixels, and of all parameters after training. The last line is one JSON object:
the numbers of trainings and samples, and of different results, which should be 1.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).parents[1]
VAE = ROOT / "experiments" / "weights" / "sprites_vae"
PRESETS = {"full": "", "tiny": "demo"}
"""Arguments of experiments/dit/sprites.py, by preset."""
BUSY = "import numpy as np; a = np.random.rand(800, 800)\nwhile True: a @ a"


def work(workdir: pathlib.Path, preset: str, samples: int) -> None:
    """In a separate process: trains unless `workdir` exists, samples, and prints the digests as JSON."""
    import numpy as np

    from vidgen.cli.main import main as vidgen
    from vidgen.pipeline.load import load

    config = f"{ROOT / 'experiments' / 'dit' / 'sprites.py'}:{PRESETS[preset]}".rstrip(":")
    options = {"num_steps": 4, "batch_size": 4, "log_every": 1, "eval_every": 1_000_000}
    overrides = [f"--config.run.{name}={value}" for name, value in options.items()]
    overrides += [f"--config.task.vae={VAE}", "--config.optimizer.warmup_steps=0"]
    trained = not workdir.exists()
    if trained and vidgen(["train", f"--config={config}", f"--workdir={workdir}", *overrides]):
        sys.exit("training failed")
    pipe = load(workdir)
    found: dict[str, list[str]] = {"pixels": [], "parameters": []}
    if trained:
        import jax

        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(pipe.model)]
        found["parameters"] = [hashlib.blake2b(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()]
    for _ in range(samples):
        video = np.asarray(pipe(["a red circle moving left", "a blue star moving up"], seed=5, steps=6))
        found["pixels"].append(hashlib.blake2b(video.tobytes()).hexdigest())
    print(json.dumps(found))


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Context manager: runs `processes` processes that multiply matrices during the block."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def caches(folder: pathlib.Path) -> Mapping[str, Mapping[str, str]]:
    """Environment variables of each cache configuration."""
    name, least = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    return {
        "none": {},
        "all": {name: str(folder / "all"), least: "0"},
        "default": {name: str(folder / "default"), least: "1"},
        "loaded": {name: str(folder / "loaded"), least: "1"},
    }


def main() -> None:
    """Prints a line per process, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=3, help="processes per configuration")
    parser.add_argument("--samples", type=int, default=5, help="samples per process")
    parser.add_argument("--load", type=int, default=6, help="number of busy processes")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.preset, arguments.samples)
        return
    found: dict[str, list[str]] = {"pixels": [], "parameters": []}
    with tempfile.TemporaryDirectory() as folder:
        ways = caches(pathlib.Path(folder))
        plans = [(cache, load, cores) for cache in ways for load in (0, 1) for cores in ("all", "one")]
        # Programs in the cache `loaded` are compiled under load, those in the other caches without load.
        plans.sort(key=lambda plan: (plan[0] == "loaded") * -plan[1])
        for number, (cache, load, cores) in enumerate(plans):
            for process in range(arguments.processes):
                # Each configuration trains once; its other processes sample from the very first run.
                workdir = pathlib.Path(folder) / ("run0" if process else f"run{number}")
                command = [sys.executable, __file__, f"--work={workdir}"]
                command += [f"--preset={arguments.preset}", f"--samples={arguments.samples}"]
                if cores == "one":
                    command = ["taskset", "-c", "0", *command]
                environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
                environment |= {"PYTHONPATH": str(ROOT), **ways[cache]}
                with busy(arguments.load * load):
                    output = subprocess.run(command, env=environment, capture_output=True, text=True)
                if output.returncode:
                    sys.exit(output.stderr)
                new = json.loads(output.stdout.splitlines()[-1])
                for kind in found:
                    found[kind] += new[kind]
                shown = {kind: [digest[:8] for digest in digests] for kind, digests in new.items()}
                print(f"cache {cache}, load {load}, cores {cores}: {shown}", flush=True)
    print(
        json.dumps(
            {
                "trainings": len(found["parameters"]),
                "samples": len(found["pixels"]),
                "different_parameters": len(set(found["parameters"])),
                "different_pixels": len(set(found["pixels"])),
            }
        )
    )


if __name__ == "__main__":
    main()
