"""Every test runs on eight CPU devices, and compiled programs are kept between runs."""

import fcntl
import importlib.metadata
import os
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).parents[1]
CACHE = str(ROOT / ".cache" / "jax")

# For this process, and for those that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
JAXLIB = importlib.metadata.version("jaxlib")
XLA_FLAGS = " ".join(
    (
        # Most of the time of the tests is that of the compiler.
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < "0.11" else []),  # later: unknown, which aborts
        "--xla_cpu_parallel_codegen_split_count=1",
        # Eight devices share what cores there are: one may wait long for the others.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(ROOT))  # `from tests.train import toy`

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def let_go_of_programs():
    """Compiled programs of one file are of no use to the next, and together they fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """Workdirs `vae` and `dit` of the tiny sprite experiments, trained once, on one device."""
    from tests.few_devices import few_devices
    from vidgen.cli import train

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_runs"
    root.mkdir(exist_ok=True)
    vae, dit, done = root / "vae", root / "dit", root / "done"
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            config = str(ROOT / "experiments" / "{}" / "sprites.py:tiny")
            with few_devices(1):
                assert train.main([f"--config={config.format('vae')}", f"--workdir={vae}"]) == 0
                on = f"--config.task.vae={vae}"
                assert train.main([f"--config={config.format('dit')}", f"--workdir={dit}", on]) == 0
            done.touch()
    return types.SimpleNamespace(vae=vae, dit=dit)
