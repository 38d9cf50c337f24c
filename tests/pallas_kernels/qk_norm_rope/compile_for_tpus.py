"""Compiles the kernels for TPUs that are not there, in a process of its own: libtpu reads variables once.

python compile_for_tpus.py GENERATION... < cases.json; prints a list in JSON per generation and case.
"""

import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from vidgen.pallas_kernels.qk_norm_rope.rotation import Rotation
from vidgen.pallas_kernels.qk_norm_rope.vjp import norm_rope

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled(devices, *, batch, length, heads, head_dim, clips, dtype):
    """Counts kernels of a program for the result and the gradients, and what moves arrays as large as x.

    Two devices have a batch each.
    """
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("data",))
    cut, whole = jax.P("data"), jax.P()
    of = lambda spec, *shape, dtype="float32": jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    x = of(cut, 2 * batch, length, heads * head_dim, dtype=dtype)
    weight = of(whole, heads * head_dim)
    of_each = cut if clips > 1 else whole
    table = of(of_each, 2 * clips if clips > 1 else 1, length, 128 if head_dim <= 128 else 256)

    def function(x, weight, table):
        return norm_rope(x, weight, Rotation(table=table, head_dim=head_dim))

    def both(x, weight, table, cotangent):
        parts = jax.shard_map(function, in_specs=(cut, whole, of_each), out_specs=cut)
        result, pullback = jax.vjp(lambda x, weight: parts(x, weight, table), x, weight)
        return result, pullback(cotangent)

    with jax.set_mesh(mesh):  # So that kernels can ask which TPU they are for.
        program = jax.jit(both).lower(x, weight, table, x).compile().as_text()
    entry = program[program.index("\nENTRY") :]
    of_size = re.findall(rf"\[{batch},{length},\d+\]\S* ([\w-]+)\(", entry)
    return {
        "kernels": entry.count('custom_call_target="tpu_custom_call"'),
        "moves": sorted({"copy", "transpose", "reshape", "fusion"}.intersection(of_size)),
    }


def main():
    cases = json.load(sys.stdin)
    assert jnp.zeros(()).device.platform == "cpu"
    for generation in sys.argv[1:]:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices
        for case in cases:
            print(json.dumps([generation, case, compiled(devices, **case)]), flush=True)


if __name__ == "__main__":
    main()
