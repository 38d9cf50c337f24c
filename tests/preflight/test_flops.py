import jax
import jax.numpy as jnp

from vidgen.ops.attention import attention
from vidgen.parallel.mesh import MeshOptions
from vidgen.preflight.flops import matmul_flops


def flops(function, *shapes):
    return matmul_flops(
        jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    )


def test_products():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert (
        flops(lambda a, b: jnp.einsum("bsnk,brnk->bnsr", a, b), (2, 3, 4, 5), (2, 6, 4, 5))
        == 2 * 2 * 3 * 4 * 5 * 6
    )
    assert flops(lambda a: jnp.sin(a) + a, (3, 5)) == 0


def test_a_loop_counts_as_often_as_it_runs_and_recomputation_counts_again():
    def chain(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x, kernels)[0]

    def rematerialised(x, kernels):
        body = jax.checkpoint(lambda x, kernel: (jnp.sin(x @ kernel), None), prevent_cse=False)
        return jax.lax.scan(body, x, kernels)[0]

    shapes, once = ((4, 8), (5, 8, 8)), 5 * 2 * 4 * 8 * 8
    gradient = lambda f: jax.grad(lambda x, kernels: f(x, kernels).sum(), argnums=(0, 1))  # noqa: E731
    assert flops(chain, *shapes) == once
    assert flops(gradient(chain), *shapes) == 3 * once
    assert flops(gradient(rematerialised), *shapes) == 4 * once
    assert flops(jax.jit(chain), *shapes) == once


def test_kernels_of_attention_count_as_what_they_compute():
    def attend(query, key):
        return attention(query, key, key, implementation="pallas_tpu")

    query, key, product = (2, 300, 3, 64), (2, 200, 3, 64), 2 * 2 * 3 * 300 * 200 * 64
    assert flops(attend, query, key) == 2 * product
    # Backward: the scores again, and the gradients of scores, queries, keys and values.
    assert flops(jax.grad(lambda q, k: attend(q, k).sum()), query, key) == (2 + 5) * product


def test_convolutions():
    def convolve(x, kernel, stride=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 3, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    shapes = (2, 4, 8, 8, 3), (3, 3, 3, 3, 16)
    full = 2 * (2 * 4 * 8 * 8 * 16) * 27 * 3
    assert flops(convolve, *shapes) == full
    assert flops(lambda x, k: convolve(x, k, 2), *shapes) == full / 8
    both = jax.grad(lambda x, k: convolve(x, k, 2).sum(), argnums=(0, 1))
    assert flops(both, *shapes) <= 3 * full / 8 * 1.5  # Zeros between strided pixels are not counted.


def test_the_most_expensive_branch_counts():
    def branches(x, kernel):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ kernel, lambda: x @ kernel @ kernel)

    assert flops(branches, (4, 8), (8, 8)) == 2 * 2 * 4 * 8 * 8


def test_what_one_platform_does_differently_does_not_count():
    def product(x, kernel):
        return jax.lax.platform_dependent(
            x, kernel, cpu=lambda x, kernel: x @ kernel @ kernel, default=lambda x, kernel: x @ kernel
        )

    assert flops(product, (4, 8), (8, 8)) == 2 * 4 * 8 * 8
    gradient = jax.grad(lambda x, kernel: jnp.sin(product(x, kernel)).sum(), argnums=(0, 1))
    assert flops(gradient, (4, 8), (8, 8)) == 3 * 2 * 4 * 8 * 8


def test_the_work_of_all_devices_counts():
    mesh, rows = MeshOptions(data=2, context=4).build(), jax.P("context")
    body = jax.shard_map(lambda x, k: x @ k, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
    # Each of two copies is computed.
    assert flops(body, (8, 3), (3, 5)) == 2 * (2 * 8 * 3 * 5)
