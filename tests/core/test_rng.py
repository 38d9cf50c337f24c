import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import rng


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_streams_differ_by_name_and_step_and_repeat():
    key = jax.random.key(0)
    keys = [rng.stream(key, name, step) for name in ("noise", "time") for step in (None, 0, 1)]
    assert len({data(k) for k in keys}) == 6
    assert data(rng.stream(key, "noise", 1)) == data(keys[2])


def test_step_may_be_traced():
    key = jax.random.key(3)
    traced = jax.jit(lambda step: jax.random.key_data(rng.stream(key, "noise", step)))(jnp.int32(7))
    assert tuple(np.asarray(traced).tolist()) == data(rng.stream(key, "noise", 7))


def test_does_not_depend_on_the_hash_seed():
    code = (
        "import jax; from vidgen.core import rng; key = jax.random.key(0);"
        "print(jax.random.key_data(rng.stream(key, 'noise', 5)))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert seen.pop().strip() == str(jax.random.key_data(rng.stream(jax.random.key(0), "noise", 5)))
