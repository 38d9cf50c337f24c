"""Compiles jobs for a TPU in a separate process, because libtpu reads its flags at load; no TPU is needed.

    python -m vidgen.pallas_kernels.tpu_static.worker DIRECTORY

`DIRECTORY/jobs.json` lists the jobs; each job's program and dumps are written to a folder named by its index.
`measure.py` starts this and reads the folders. The folder of a compilation that crashes the process has no
file `done`.
"""

import importlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["environment", "main"]

DUMPS = "dumps"


def environment(directory: pathlib.Path, *, evaluate: bool) -> dict[str, str]:
    """Environment of a worker process: this process's, except the variables of jax and libtpu.

    Args:
      directory: folder of the jobs; dumps go to its subfolder `dumps`.
      evaluate: runs libtpu's evaluator, which kills the process on kernels that it cannot run.
    """
    dumps = directory / DUMPS
    flags = [
        f"--xla_jf_dump_to={dumps}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final_(bundles|hlo-static).*",
        # As in a model with activations larger than VMEM: arguments stay in HBM, and every transfer is part
        # of a counted operation.
        "--xla_msa_enable=false",
    ]
    if evaluate:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={dumps / 'profile'}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        # A cached program writes no dumps.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def main(directory: pathlib.Path) -> None:
    """Compiles the jobs of a directory one after another."""
    plan = json.loads((directory / "jobs.json").read_text())
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=plan["topology"])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    shutil.rmtree(directory / DUMPS, ignore_errors=True)  # Left by a job that crashed its worker.
    for job in plan["jobs"]:
        folder = directory / str(job["index"])
        folder.mkdir()
        signal.setitimer(signal.ITIMER_REAL, plan["limit"])  # Python handles no signal while libtpu compiles.
        try:
            _compile(job, mesh, folder)
        except Exception as error:
            (folder / "error").write_text(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        for file in [path for path in (directory / DUMPS).glob("*") if path.is_file()]:
            file.rename(folder / file.name)
        (folder / "done").touch()


def _compile(job: dict[str, Any], mesh: Any, folder: pathlib.Path) -> None:
    """Writes the compiled program's text and the grids of its kernels to `folder`."""
    import jax

    function, arguments = _load(job["build"])(**job["keywords"])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.set_mesh(mesh):  # Kernels read the TPU generation from the mesh in context.
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower().compile()
    (folder / "grids.json").write_text(json.dumps(list(_grids(traced.jaxpr.jaxpr))))
    (folder / "program.txt").write_text(compiled.as_text() or "")


def _load(name: str) -> Any:
    """The function that `module:function` or `path/to/file.py:function` names."""
    where, _, function = name.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), function)
    spec = importlib.util.spec_from_file_location(pathlib.Path(where).stem, where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _grids(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """(name, number of grid steps) of the Pallas kernels in a jaxpr, including nested jaxprs."""
    import jax

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"].grid
            if all(isinstance(size, int) for size in grid):
                yield str(equation.params["name"]), math.prod(grid)
            continue
        for inside in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inside = getattr(inside, "jaxpr", inside)
            if hasattr(inside, "eqns"):
                yield from _grids(inside)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
