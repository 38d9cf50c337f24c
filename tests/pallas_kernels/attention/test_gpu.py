"""The GPU kernels: numbers in interpret mode, and what they are lowered to for a GPU that is not there."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache
from jax.experimental import topologies

from tests.pallas_kernels.attention import triton_numpy
from tests.pallas_kernels.attention.cases import AttentionCases
from vidgen.pallas_kernels.attention import gpu
from vidgen.pallas_kernels.attention.gpu_visits import list_visits
from vidgen.pallas_kernels.attention.masks import BlockMask, KeyRanges, causal_ranges, segment_ranges

HEAD_DIMS = (64, 96, 128, 192, 256)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


class TestGpu(AttentionCases):
    forward = staticmethod(jax.jit(functools.partial(gpu.forward, interpret=True), static_argnames="scale"))
    backward = staticmethod(jax.jit(functools.partial(gpu.backward, interpret=True), static_argnames="scale"))
    # Each is a compilation; the cases that stay have most of what these show.
    slow = (
        "test_block_mask",
        "test_block_mask_of_larger_blocks",
        "test_head_dimensions[96-bfloat16]",
        "test_head_dimensions[128-bfloat16]",
        "test_head_dimensions[256-bfloat16]",
        "test_lengths[(128, 128)-float32]",
        "test_lengths[(1, 200)-float32]",
        "test_nothing_is_seen[hidden]",
    )

    def test_float16(self):
        self.check(self.inputs(self.length, self.length, dtype="float16"))

    def test_what_is_not_supported_says_so(self):
        query, key, value, _ = self.inputs(128, 128)
        blocks = BlockMask(blocks=jnp.ones((2, 1), bool), query_size=128, key_size=128)
        with pytest.raises(NotImplementedError, match="bfloat16"):
            self.forward(query, key.astype("bfloat16"), value)
        with pytest.raises(NotImplementedError, match="scale"):
            self.forward(query, key, value, scale=-1.0)
        with pytest.raises(NotImplementedError, match="some of each"):
            self.forward(query, key[:, :0], value[:, :0])
        with pytest.raises(ValueError, match=r"expected \(1, 1\)"):
            self.forward(query, key, value, block_mask=blocks)
        with pytest.raises(ValueError, match="b r n k"):
            self.forward(query, key[..., :1, :], value[..., :1, :])


@pytest.fixture
def lowered(monkeypatch):
    """What is lowered for a GPU is computed, in NumPy."""
    instead = functools.partial(triton_numpy.pallas_call, original=gpu.pl.pallas_call)
    monkeypatch.setattr(gpu.pl, "pallas_call", instead)


@pytest.mark.slow
@pytest.mark.usefixtures("lowered")
class TestGpuLowered(AttentionCases):
    """All numbers once more, of the programs that a GPU would run."""

    forward, backward = staticmethod(gpu.forward), staticmethod(gpu.backward)
    dtypes = ("bfloat16", "float16", "float32")
    heads = 1


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("masked", [slow(False), True])
def test_what_is_lowered_for_a_gpu_computes_attention(masked):
    """Where it reads and writes, too: strides, tails and parts of a head dimension."""
    cases = TestGpuLowered()
    own, theirs = (jnp.broadcast_to((jnp.arange(n) // 20)[None], (2, n)) for n in (67, 150))
    ranges = causal_ranges(own, theirs, past=1) if masked else None
    cases.check(cases.inputs(67, 150, 96, "bfloat16"), ranges=ranges)


def segments(queries, keys):
    """Of both, contiguous; the second example is one segment."""
    own, theirs = (jnp.stack([jnp.arange(n) * 5 // n, jnp.zeros(n, jnp.int32)]) for n in (queries, keys))
    return segment_ranges(own, theirs)


def causal(queries, keys):
    times = (jnp.tile(jnp.arange(n)[None] // 40, (2, 1)) for n in (queries, keys))
    return causal_ranges(*times)


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("mask", ["segments", "causal", "blocks", "both"])
def test_blocks_are_visited_where_anything_is_seen(mask, of_keys):
    """And need no mask where everything is; the cost is that of the visits."""
    queries, keys, query_block, key_block = 500, 450, 64, 32
    ranges = {"segments": segments, "causal": causal, "both": segments}.get(mask)
    ranges = ranges and ranges(queries, keys)
    block_mask = None
    visible = np.ones((2, queries, keys), bool) if ranges is None else np.asarray(ranges.visible())
    if mask in ("blocks", "both"):
        blocks = jnp.asarray(np.eye(4, 2, dtype=bool) | np.eye(4, 2, -3, dtype=bool))
        block_mask = BlockMask(blocks=blocks, query_size=128, key_size=256)
        visible = visible & np.asarray(block_mask.visible(queries, keys))[None]
    visits = list_visits(
        ranges,
        block_mask,
        queries=queries,
        keys=keys,
        query_block=query_block,
        key_block=key_block,
        of_keys=of_keys,
    )
    # Keys beyond the end are never seen. What queries beyond it see matters only where they are summed.
    room = np.zeros((2, 512, 480), bool)
    room[:, :queries, :keys] = visible
    tiles = room.reshape(2, 8, query_block, 15, key_block)
    if of_keys:
        seen, whole = (x.swapaxes(1, 2) for x in (tiles.any((2, 4)), tiles.all((2, 4))))
    else:
        room[:, queries:, :keys] = visible[:, -1:]
        seen, whole = tiles.any((2, 4)), tiles.all((2, 4))
    assert 0 < seen.sum() < seen.size and whole.any()
    for example, row in np.ndindex(seen.shape[:2]):
        batch = example if visits.order.shape[0] > 1 else 0
        first, count = visits.counts[batch, row]
        order = visits.order[batch, row]
        assert set(order[:first].tolist()) == set(np.flatnonzero(whole[example, row]))
        assert set(order[:count].tolist()) == set(np.flatnonzero(seen[example, row]))


def abstract(head_dim, dtype="bfloat16", sharding=None, masked=False):
    """Arguments of both functions at the size of a video of Wan 2.1 at 480p."""
    shaped = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    x = shaped((1, 32760, 12, head_dim), jnp.dtype(dtype))
    codes = shaped((1, 32760), jnp.int32)
    ranges = KeyRanges(codes, codes, codes) if masked else None
    return (x, x, x), (x, x, x, x, shaped((1, 12, 32760), jnp.float32), x), ranges


@pytest.mark.parametrize(
    ("head_dim", "masked"),
    [
        pytest.param(*case, marks=[] if case in ((64, False), (192, True)) else [pytest.mark.slow])
        for case in itertools.product(HEAD_DIMS, (False, True))
    ],
)
def test_lowers_for_a_gpu(head_dim, masked):
    """To one kernel forward and two backward, loops that Triton can pipeline, and no copies outside."""
    forward, backward, ranges = abstract(head_dim, masked=masked)
    found = []
    for function, arguments in ((gpu.forward, forward), (gpu.backward, backward)):
        traced = jax.jit(lambda *x, function=function: function(*x[:-1], ranges=x[-1])).trace(
            *arguments, ranges
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
        assert not re.search(r"stablehlo.transpose.*bf16", lowered.as_text())
        found += [str(triton_numpy.parse(config)) for config in triton_numpy.configs(lowered)]
    parts = bin(head_dim).count("1")
    loops = 2 if masked else 1  # Blocks that are seen whole, and others.
    assert len(found) == 3
    for text, products in zip(found, (2, 4, 3), strict=True):
        assert text.count("scf.for") == loops and "scf.while" not in text
        bodies = 2  # With masks and without; 32,760 is not a multiple of a block.
        assert text.count("tt.dot ") == bodies * products * parts
        assert "ex2.approx.ftz" in text


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compiles_for_an_h100(head_dim, masked, dtype, monkeypatch):
    """As far as machine code, within the shared memory that there is; needs the `cuda` extra, but no GPU."""
    pytest.importorskip("jax_cuda12_plugin")
    monkeypatch.setattr(compilation_cache, "is_cache_used", lambda backend: False)  # It needs a client.
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    forward, backward, ranges = abstract(head_dim, dtype, sharding, masked)
    for function, arguments in ((gpu.forward, forward), (gpu.backward, backward)):
        jitted = jax.jit(lambda *x, function=function: function(*x[:-1], ranges=x[-1]))
        text = jitted.lower(*arguments, ranges).compile().as_text()
        assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == (
            1 if function is gpu.forward else 2
        )
