"""Speedup and quality loss of TeaCache by threshold, relative to sampling without a cache (the full run).

    python benchmarks/feature_cache.py --checkpoint runs/dit

Without a checkpoint, first trains a small model on the sprite world (experiments/dit/sprites.py:demo, 300
steps; minutes on two CPU cores). All runs use the same prompts and seeds. `computed` is the number of steps
that compute the transformer's blocks; `psnr` compares the 8-bit videos with those of the full run;
`psnr_fewer` is the PSNR of a run with only `computed` steps and no cache, which a cache has to beat;
`speedup` is the time of the full run, decoding included, over the time with the cache, each the best of
`--repeats`. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.cli import train
from vidgen.models.dit.model import DiT
from vidgen.pipeline import Pipeline, load
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.time_grid import TimeGrid

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = [
    f"a large {color} {shape} moving {way} on a {background} background"
    for color, shape, way, background in (
        ("red", "circle", "left", "blue"),
        ("green", "square", "right", "black"),
        ("yellow", "triangle", "left", "white"),
        ("blue", "star", "right", "gray"),
    )
]


def main() -> None:
    """Prints a row per threshold and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, help="workdir of a run; default: train a small model"
    )
    parser.add_argument("--vae", type=pathlib.Path, default=ROOT / "experiments" / "weights" / "sprites_vae")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pipeline = load(arguments.checkpoint or _train(pathlib.Path(folder) / "dit", arguments.vae))
        full = SamplingOptions(grid=TimeGrid(num_steps=arguments.steps))
        expected, seconds = _timed(pipeline, full, arguments.repeats)
        result = {}
        for threshold in arguments.thresholds:
            cache = TeaCache(threshold=threshold)
            videos, taken = _timed(pipeline, dataclasses.replace(full, cache=cache), arguments.repeats)
            computed = _computed(pipeline, cache, full.grid)
            fewer, _ = _timed(pipeline, SamplingOptions(grid=TimeGrid(num_steps=computed)), 1)
            result[threshold] = {
                "computed": computed,
                "speedup": seconds / taken,
                "psnr": _psnr(videos, expected),
                "psnr_fewer": _psnr(fewer, expected),
            }
            row = ", ".join(f"{name} {value:.3g}" for name, value in result[threshold].items())
            print(f"threshold {threshold:g}: {row}", flush=True)
    print(json.dumps({"steps": arguments.steps, "seconds": seconds, "thresholds": result}))


def _train(workdir: pathlib.Path, vae: pathlib.Path) -> pathlib.Path:
    config = ROOT / "experiments" / "dit" / "sprites.py"
    status = train.main(
        [
            f"--config={config}:demo",
            f"--workdir={workdir}",
            f"--config.task.vae={vae}",
            "--config.run.num_steps=300",
        ]
    )
    if status:
        raise SystemExit(status)
    return workdir


def _timed(pipeline: Pipeline, options: SamplingOptions, repeats: int) -> tuple[np.ndarray, float]:
    """The videos, and the seconds of the fastest run; excludes the first run, which compiles."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        pipeline.options = options
        videos = pipeline(PROMPTS)
        times.append(time.perf_counter() - start)
    return videos, min(times[1:])


def _computed(pipeline: Pipeline, cache: TeaCache, grid: TimeGrid) -> int:
    forced = np.zeros(grid.num_steps, bool)
    forced[[0, -1]] = True
    with jax.set_mesh(pipeline.mesh):
        dit = pipeline.model.dit
        assert isinstance(dit, DiT)
        return int(cache.computed(dit, jnp.asarray(grid.model_timesteps()[:-1]), forced).sum())


def _psnr(videos: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(videos.astype(np.float64) - expected).mean()
    return float(10.0 * np.log10(255.0**2 / error)) if error else float("inf")


if __name__ == "__main__":
    main()
