"""`vidgen demo`: trains a tiny VAE and a tiny transformer on the sprite world, then samples a prompt."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from vidgen.cli import sample, train
from vidgen.cli.main import run
from vidgen.core.paths import path_option

__all__ = ["main"]

PROMPT = "a large red circle moving left on a navy background"


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    parser = argparse.ArgumentParser(prog="vidgen demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--out", type=path_option, default=pathlib.Path("demo"), help="folder for the runs and the video"
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--arg", default="demo", help="argument for both sprites.py experiments")
    arguments = parser.parse_args(argv)

    images, vae, dit = (arguments.out / name for name in ("vae_images", "vae", "dit"))
    _train(f"experiments/vae/sprites.py:{arguments.arg},images", images)
    _train(f"experiments/vae/sprites.py:{arguments.arg}", vae, f"--config.run.init_from={images}")
    _train(f"experiments/dit/sprites.py:{arguments.arg}", dit, f"--config.task.vae={vae}")
    video = arguments.out / "sample.mp4"
    sample.main(["--checkpoint", str(dit), "--prompt", arguments.prompt, "--out", str(video)])
    for name, workdir in (("VAE on images", images), ("VAE on clips", vae), ("transformer", dit)):
        losses = _losses(workdir)
        shown = [losses[round(i * (len(losses) - 1) / 5)] for i in range(6)]
        print(f"{name} loss: " + " -> ".join(f"{loss:.3f}" for loss in shown))
    print(f'"{arguments.prompt}": {video}')
    return 0


def _train(config: str, workdir: pathlib.Path, *overrides: str) -> None:
    print(f"vidgen train --config={config} --workdir={workdir} {' '.join(overrides)}", flush=True)
    status = train.main([f"--config={config}", f"--workdir={workdir}", *overrides])
    if status:
        raise RuntimeError(f"training {config} ended with status {status}; see {workdir}")


def _losses(workdir: pathlib.Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


if __name__ == "__main__":
    sys.exit(run(main))
