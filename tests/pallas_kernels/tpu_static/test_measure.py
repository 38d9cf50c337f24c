"""Measuring: processes that die or hang, without libtpu; and two kernels with it."""

import importlib.util
import json
import pathlib
import signal
import types

import pytest

from vidgen.pallas_kernels.tpu_static import measure as measuring
from vidgen.pallas_kernels.tpu_static.measure import Job, MeasureError, measure

FATAL = (
    "I0000 of no interest\nF1125 14:02:41.115671    9042 llo_module.cc:66] Check failed: no branch\n  at x\n"
)


@pytest.fixture
def processes(monkeypatch):
    """Workers that do as the job's name says: what each was started with, as (jobs, evaluator)."""
    started = []

    def run(command, *, env, stdout, stderr, check):
        directory = pathlib.Path(command[-1])
        assert command[1:3] == ["-m", "vidgen.pallas_kernels.tpu_static.worker"]
        evaluator = "--xla_jf_dump_static_llo_profile_to" in env["LIBTPU_INIT_ARGS"]
        plan = json.loads((directory / "jobs.json").read_text())
        assert plan["topology"] == "v6e:2x2"
        started.append(([job["build"] for job in plan["jobs"]], evaluator))
        for job in plan["jobs"]:
            folder = directory / str(job["index"])
            folder.mkdir()  # It was cleared.
            if job["build"] == "never":
                return types.SimpleNamespace(returncode=1)
            if job["build"] == "hangs":
                return types.SimpleNamespace(returncode=-signal.SIGALRM)
            if job["build"] == "dies" or (job["build"] == "evaluator dies" and evaluator):
                stdout.write(FATAL)
                return types.SimpleNamespace(returncode=-6)
            (folder / "grids.json").write_text("[]")
            (folder / "program.txt").write_text("HloModule empty")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(measuring.subprocess, "run", run)
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: name)
    return started


def jobs(*names):
    return [Job(build=name) for name in names]


def test_jobs_share_a_process(processes):
    reports = measure(jobs("a", "b"), generation="v6e")
    assert processes == [(["a", "b"], True)]
    assert [(r.failure, r.unevaluated) for r in reports] == [("", "")] * 2


def test_what_kills_the_evaluator_is_compiled_without_it_and_the_others_go_on(processes):
    reports = measure(jobs("a", "evaluator dies", "b"), generation="v6e")
    assert processes == [
        (["a", "evaluator dies", "b"], True),
        (["b"], True),
        (["evaluator dies"], False),
    ]
    assert [r.failure for r in reports] == ["", "", ""]
    message = "the compiler died with status -6: llo_module.cc:66] Check failed: no branch"
    assert [r.unevaluated for r in reports] == ["", message, ""]


def test_what_cannot_be_compiled_is_a_failure_of_its_own(processes):
    reports = measure(jobs("dies", "hangs", "a"), generation="v6e", limit=5)
    assert [r.failure for r in reports] == [reports[0].unevaluated, "took longer than 5 s", ""]
    assert reports[0].cycles() is None
    assert processes[-1] == (["hangs"], False)


def test_the_evaluator_can_be_left_out(processes):
    measure(jobs("a"), generation="v6e", evaluate=False)
    assert processes == [(["a"], False)]


def test_a_worker_that_does_not_start_is_an_error(processes, monkeypatch):
    run = lambda *_, **__: types.SimpleNamespace(returncode=1)  # noqa: E731
    monkeypatch.setattr(measuring.subprocess, "run", run)
    with pytest.raises(MeasureError, match="did not start"):
        measure(jobs("a"), generation="v6e")


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(MeasureError, match="generation v4: expected one of v5e, v5p, v6e, tpu7x"):
        measure([], generation="v4")
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeasureError, match=r'libtpu.* is not installed: pip install "jax\[tpu\]"'):
        measure([], generation="v6e")


def matmul(*, size, transposed=False):
    """A product of square matrices by a Pallas kernel, in blocks of 512."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def body(x, y, z):
        z[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32).astype(z.dtype)

    kernel = pl.pallas_call(
        body,
        grid=(size // 512, size // 512),
        in_specs=[
            pl.BlockSpec((512, size), lambda i, j: (i, 0)),
            pl.BlockSpec((size, 512), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((512, 512), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.bfloat16),
        name="product",
    )
    call = (lambda x, y: kernel(x, y).T + x) if transposed else kernel
    return call, [jax.ShapeDtypeStruct((size, size), jnp.bfloat16)] * 2


def wrong():
    raise ValueError("there is no such function")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "jax[tpu]"'
)
def test_a_product_takes_the_cycles_of_its_multiplications():
    here = str(pathlib.Path(__file__))
    names = [("matmul", {"size": 1024}), ("wrong", {}), ("matmul", {"size": 2048, "transposed": True})]
    found = [Job(build=f"{here}:{name}", keywords=keywords) for name, keywords in names]
    small, failed, large = measure(found, generation="v6e")
    assert failed.failure == "ValueError: there is no such function"
    for report, size in ((small, 1024), (large, 2048)):
        [kernel] = report.kernels
        ideal = size**3 / 262_144
        assert kernel.steps == (size // 512) ** 2 and kernel.instruction.name.startswith("product")
        assert kernel.bottleneck == "MXU"
        assert ideal < kernel.modelled < 1.5 * ideal
        # With few steps much of it is the wait for the first block and the last result.
        assert report.method == "evaluator" and ideal < kernel.evaluated < 2.5 * ideal
        # Two buffers for each of the three blocks.
        assert kernel.instruction.scoped_bytes >= 2 * (2 * 512 * size + 512 * 512) * 2
    assert small.operations == ()
    assert large.operations and large.cycles() == large.kernel_cycles() + large.operation_cycles()
    assert all(operation.instruction.evaluated for operation in large.operations)
    assert large.operation_cycles() > 0.8 * 3 * 2048**2 * 2 / 937
