"""On TPUs a ring's keys travel while the kernel computes: the schedule says so, compiled without a TPU."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from vidgen.preflight.topology import prepare_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
    ),
]

_COMPILE = """
import jax
import jax.numpy as jnp

from vidgen.ops.sequence_parallel import SequenceParallel, sequence_attention
from vidgen.parallel.mesh import MeshOptions
from vidgen.preflight.topology import topology_devices

mesh = MeshOptions(data=1, context=4).build(topology_devices("v5p:2x2x1"))

def ring(query, key, value):
    return sequence_attention(query, key, value, options=SequenceParallel(method="{method}"))

def gradients(query, key, value, cotangent):
    return jax.vjp(ring, query, key, value)[1](cotangent)

with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, jax.P(None, "context"))
    x = jax.ShapeDtypeStruct((1, 4 * 4096, {heads}, 128), jnp.bfloat16, sharding=place)
    print(jax.jit(ring, out_shardings=place).lower(x, x, x).compile().as_text())
    print("=====")
    print(jax.jit(gradients, out_shardings=place).lower(x, x, x, x).compile().as_text())
"""


def programs(method, heads):
    """Schedules of the forward pass, and of both passes, as text."""
    environment = dict(os.environ)
    prepare_environment(environment)
    command = [sys.executable, "-c", _COMPILE.format(method=method, heads=heads)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.split("=====")


def schedules(program):
    """Names of the instructions of each computation that has a kernel, in the order in which they run."""
    assert "is_scheduled=true" in program
    computations = re.split(r"\n\}\n", program)
    named = (re.findall(r"^\s+(?:ROOT )?%([\w-]+)(?:\.\d+)* = ", text, re.MULTILINE) for text in computations)
    return [names for names in named if {"attention_forward", "attention_backward"} & set(names)]


def in_flight(names, kernel):
    """How many arrays have left when the kernel begins, and come after it ended."""
    at = names.index(kernel)
    sent, come = "collective-permute-start", "collective-permute-done"
    assert names.count(kernel) == 1 and names[:at].count(come) == 0
    return names[:at].count(sent), names[at:].count(come)


def test_keys_travel_while_the_kernels_compute():
    forward, both = programs("ring", 2)
    for program in (forward, both):
        # A turn of the loop; the last turn, which sends nothing, is of the main program.
        body, *_ = [n for n in schedules(program) if "attention_backward" not in n]
        assert in_flight(body, "attention_forward") == (2, 2)
        assert "collective-permute-start" not in body[body.index("attention_forward") :]
    body, main = [n for n in schedules(both) if "attention_backward" in n]
    # Keys, values, and the sums of their gradients.
    assert in_flight(body, "attention_backward") == (4, 4)
    assert "collective-permute-start" not in body[body.index("attention_backward") :]
    # The first turn sends keys and values, the last the sums, which after it go home.
    first, last = [i for i, name in enumerate(main) if name == "attention_backward"]
    moves = [
        [n for n in part if "collective-permute" in n]
        for part in (main[:first], main[first:last], main[last:])
    ]
    start, done = "collective-permute-start", "collective-permute-done"
    assert moves[0] == [start] * 2
    assert moves[1] == [done] * 2 + [start] * 2
    assert sorted(moves[2]) == [done] * 4 + [start] * 2
    assert moves[2][:2] == [done] * 2


def test_devices_that_exchange_heads_run_the_kernels():
    for program, kernel in zip(
        programs("ulysses", 8), ("attention_forward", "attention_backward"), strict=True
    ):
        assert any(kernel in names for names in schedules(program))
        assert "all-to-all" in program
        assert "collective-permute" not in program and "all-gather" not in program
