"""libtpu compiles what is shipped for every generation, within the vector memory of its cores."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest

from vidgen.pallas_kernels.attention import tpu
from vidgen.pallas_kernels.attention.masks import causal_ranges, segment_ranges
from vidgen.pallas_kernels.attention.specs import GENERATIONS
from vidgen.pallas_kernels.tpu_static.measure import Job, measure

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "vidgen[tpu]"'
)


def ranges_of(mask, numbers):
    if mask == "none":
        return None
    return segment_ranges(numbers, numbers) if mask == "segments" else causal_ranges(numbers, numbers)


def forward(*, generation, heads, head_dim, length, dtype, mask):
    """For `measure`."""

    def call(query, key, value, numbers):
        return tpu.forward(query, key, value, ranges=ranges_of(mask, numbers), generation=generation)

    tokens = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.dtype(dtype))
    return call, [tokens, tokens, tokens, jax.ShapeDtypeStruct((1, length), jnp.int32)]


def backward(*, generation, heads, head_dim, length, dtype, mask):
    """For `measure`."""

    def call(query, key, value, output, log_sum_exp, cotangent, numbers):
        ranges = ranges_of(mask, numbers)
        inputs = (query, key, value, output, log_sum_exp, cotangent)
        return tpu.backward(*inputs, ranges=ranges, generation=generation)

    _, (*tokens, numbers) = forward(
        generation=generation, heads=heads, head_dim=head_dim, length=length, dtype=dtype, mask=mask
    )
    sums = jax.ShapeDtypeStruct((1, heads, length), jnp.float32)
    return call, [*tokens, tokens[0], sums, tokens[0], numbers]


def forward_of_layers(**keywords):
    """For `measure`: a loop whose results are put into stacks."""
    return of_layers(*forward(**keywords))


def backward_of_layers(**keywords):
    """As `forward_of_layers`."""
    return of_layers(*backward(**keywords))


def of_layers(call, arguments):
    *arrays, numbers = arguments

    def loop(*stacks):
        *stacks, numbers = stacks
        return jax.lax.scan(lambda _, layer: (None, call(*layer, numbers)), None, tuple(stacks))[1]

    return loop, [*(jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in arrays), numbers]


def check(generation, which, cases):
    jobs = [Job(build=f"{__file__}:{which}", keywords={"generation": generation, **case}) for case in cases]
    reports = measure(jobs, generation=generation, evaluate=False)
    failures = {str(case): r.failure for case, r in zip(cases, reports, strict=True) if r.failure}
    assert failures == {}
    limit = GENERATIONS[generation].vmem_bytes
    for report in reports:
        assert 0 < max(kernel.instruction.scoped_bytes for kernel in report.kernels) <= limit


def case(heads, head_dim, *, length=2048, dtype="bfloat16", mask="none"):
    return {"heads": heads, "head_dim": head_dim, "length": length, "dtype": dtype, "mask": mask}


@pytest.mark.parametrize(
    ("generation", "which"),
    [
        ("v6e", "backward"),
        ("tpu7x", "forward"),
        pytest.param("v5e", "forward", marks=pytest.mark.slow),
        pytest.param("v5p", "backward", marks=pytest.mark.slow),
    ],
)
def test_compiles(generation, which):
    """One of each pass, of those that compile fastest."""
    check(generation, which, [case(1, 256)])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_in_all_configurations(generation, which):
    """Every line of the table, with as many heads as blocks hold; 96 and 192 channels are padded."""
    lines = (64, 128, 256)
    cases = [
        *(case(4, head_dim, length=length) for head_dim in lines for length in (8192, 8000)),
        *(case(4, head_dim, length=8192) for head_dim in (96, 192)),
        *(case(8 if head_dim == 64 else 4, head_dim, length=8192, mask="segments") for head_dim in lines),
        case(4, 128, length=8192, mask="frames"),
        *(
            case(4, head_dim, length=8192, dtype="float32", mask=mask)
            for head_dim, mask in itertools.product(lines, ("none", "segments"))
        ),
    ]
    check(generation, which, cases)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["forward_of_layers", "backward_of_layers"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_in_a_loop(generation, which):
    """XLA fuses a kernel with what puts its results into a stack, which must not take its memory from it."""
    check(generation, which, [case(8, 64, length=8192, mask="segments"), case(1, 128, length=32768)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_long_sequences_compile(generation):
    """The longest whose gradients of queries are held to fit at once, and one more block, in two parts."""
    cases = []
    for dim in (64, 128, 256):
        shape = case(128 // min(dim, 128), dim)
        length = longest(generation, shape)
        cases += [shape | {"length": length}, shape | {"length": length + 2048 - 200}]
    check(generation, "backward", cases)


def longest(generation, shape):
    def fits(length):
        tokens = jax.ShapeDtypeStruct((1, length, shape["heads"], shape["head_dim"]), shape["dtype"])
        return tpu.Call.of(tokens, tokens, "backward", masked=False, generation=generation).queries == length

    return max(length for length in range(2048, 400_000, 2048) if fits(length))
