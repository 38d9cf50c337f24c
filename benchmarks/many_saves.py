"""Saves many tiny checkpoints and checks that descriptors, threads and memory stay bounded.

    python benchmarks/many_saves.py --saves 3000

Linux only: reads /proc. The last line is one JSON object: `descriptors`, `threads` and `resident_mib` after a
tenth of the saves, after half of them and at the end, and `bounded`, true if none of them grew in the second
half (memory: by at most 5 %).
"""

import argparse
import json
import os
import pathlib
import tempfile
import threading
import time

import jax.numpy as jnp

from vidgen.ckpt.manager import CheckpointManager


def main() -> None:
    """Prints the figures and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=3000)
    saves = parser.parse_args().saves
    state = {"kernel": jnp.ones((16, 16)), "bias": jnp.zeros(16), "step": jnp.zeros((), jnp.int32)}
    measured = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, CheckpointManager(folder, keep=2) as manager:
        for step in range(1, saves + 1):
            manager.save(step, state, {"data": {"next": step}})
            if step in (saves // 10, saves // 2, saves):
                manager.wait()
                measured.append(_measure())
                print(f"{step} saves, {time.monotonic() - begin:.0f} s: {measured[-1]}", flush=True)
    _, middle, end = measured
    bounded = all(end[name] <= middle[name] * (1.05 if name == "resident_mib" else 1) for name in end)
    figures = {name: [part[name] for part in measured] for name in end}
    print(json.dumps({"saves": saves, **figures, "bounded": bounded}))


def _measure() -> dict[str, float]:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "resident_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
    }


if __name__ == "__main__":
    main()
