"""Peak host memory of loading and saving a transformer, in excess of its arrays.

    python benchmarks/load_memory.py [--dim 1024] [--layers 16]

Writes a random checkpoint in bfloat16. Then a process with 8 CPU devices loads it sharded over `fsdp` and
saves it again. On CPUs device memory is host memory, so the bytes of the loaded arrays are subtracted from
the peak; pages of memory-mapped files, which the system can reclaim, are not counted. The last line is one
JSON object: MiB in excess of the arrays, of the largest tensor, and of the largest shard of an array;
`within` says whether the excess of loading is at most the sum of the latter two.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

_MIB = 2**20


def main() -> None:
    """Makes the checkpoint and measures, each in a separate process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--child", choices=("make", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "make":
        make(arguments.folder, arguments.dim, arguments.layers)
    elif arguments.child == "load":
        print(json.dumps(load(arguments.folder)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for child in ("make", "load"):
                command = [sys.executable, __file__, *sys.argv[1:], "--child", child, "--folder", folder]
                subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def make(folder: pathlib.Path, dim: int, layers: int) -> None:
    """Writes a transformer with random bfloat16 weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vidgen.models.dit.config import DiTConfig
    from vidgen.models.dit.diffusers_folder import save_diffusers
    from vidgen.models.dit.model import DiT

    config = DiTConfig(
        model_dim=dim, num_heads=dim // 64, num_layers=layers, ffn_dim=4 * dim, text_dim=512, freq_dim=256
    )
    dit = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    dit = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, jnp.bfloat16), dit)
    save_diffusers(dit, folder)


def load(folder: pathlib.Path) -> dict[str, float | bool]:
    """Loads over 8 devices and saves again; returns the memory of each in excess of the arrays, in MiB."""
    import jax
    from flax import nnx

    jax.config.update("jax_num_cpu_devices", 8)
    from vidgen.core.tree import named_leaves, num_bytes
    from vidgen.models.dit.diffusers_folder import load_diffusers, save_diffusers
    from vidgen.parallel.mesh import MeshOptions

    mesh = MeshOptions(data=1, fsdp=8).build()
    jax.block_until_ready(jax.numpy.zeros(1))
    with _Peak() as loading:
        dit = load_diffusers(folder, mesh, keep_dtypes=True)
        jax.block_until_ready(nnx.state(dit))
    leaves = named_leaves(nnx.state(dit))
    arrays = num_bytes(nnx.state(dit))
    largest = max(
        leaf.nbytes // (leaf.shape[0] if name.startswith("blocks.") else 1) for name, leaf in leaves.items()
    )
    part = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves.values())
    with _Peak() as writing:
        save_diffusers(dit, folder / "again")
    beside = loading.bytes - arrays
    return {
        "arrays_mib": arrays / _MIB,
        "largest_tensor_mib": largest / _MIB,
        "largest_part_mib": part / _MIB,
        "loading_beside_arrays_mib": beside / _MIB,
        "writing_beside_arrays_mib": writing.bytes / _MIB,
        "within": beside <= largest + part,
    }


class _Peak:
    """Context manager: peak anonymous memory of this process during the block, minus that at its start."""

    def __enter__(self) -> "_Peak":
        self._before = self._most = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._most - self._before

    def _watch(self) -> None:
        while not self._done.is_set():
            self._most = max(self._most, _anonymous())
            time.sleep(0.002)


def _anonymous() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
