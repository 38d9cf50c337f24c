"""The worker's parts that need no libtpu."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from vidgen.pallas_kernels.tpu_static import worker


def test_a_worker_has_its_own_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    found = worker.environment(tmp_path, evaluate=True)
    assert not {"XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"} & set(found)
    assert found["JAX_ENABLE_COMPILATION_CACHE"] == "false" and found["JAX_PLATFORMS"] == "cpu"
    assert f"--xla_jf_dump_to={tmp_path}/dumps" in found["LIBTPU_INIT_ARGS"].split()
    assert "profile" not in worker.environment(tmp_path, evaluate=False)["LIBTPU_INIT_ARGS"]


def twice(name, grid):
    def body(x, y):
        y[...] = 2 * x[...]

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return pl.pallas_call(body, out_shape=shape, grid=grid, name=name)


def test_grids_are_found_wherever_a_kernel_is_called():
    @jax.jit
    def inner(x):
        return jax.lax.cond(x[0, 0] > 0, twice("in_cond", (2, 3)), lambda x: x, x)

    def function(x):
        x = jax.lax.scan(lambda carry, _: (twice("in_scan", (5,))(carry), None), x, length=2)[0]
        return inner(twice("outside", ())(x))

    traced = jax.jit(function).trace(jnp.zeros((8, 128)))
    found = list(worker._grids(traced.jaxpr.jaxpr))
    assert found == [("in_scan", 5), ("outside", 1), ("in_cond", 6)]


def test_functions_are_named_by_module_or_file(tmp_path):
    assert worker._load("math:sqrt") is math.sqrt
    file = tmp_path / "jobs.py"
    file.write_text("def build():\n    return 7\n")
    assert worker._load(f"{file}:build")() == 7
    with pytest.raises(AttributeError, match="other"):
        worker._load(f"{file}:other")
