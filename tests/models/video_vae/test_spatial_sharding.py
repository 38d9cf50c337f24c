"""Height and width over devices: the result is that of one device, and only edges are exchanged."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.models.random_weights import random_module
from tests.models.video_vae.test_streaming import CONFIGS, PARAMS, normal
from vidgen.models.video_vae import streaming
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions

# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", params=PARAMS, ids=CONFIGS.keys())
def vae(request):
    return random_module(lambda: VideoVAE(request.param, rngs=nnx.Rngs(0)))


MESHES = {
    4: MeshOptions(data=1, context=4, tensor=2),
    # Five rows are not divisible: both devices of `tensor` have all of them, until there are more.
    5: MeshOptions(data=2, context=2, tensor=2),
}


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (streaming.encode, 4),
        (streaming.decode, 5),
        pytest.param(streaming.encode, 5, marks=pytest.mark.slow),
        pytest.param(streaming.decode, 4, marks=pytest.mark.slow),
    ],
)
def test_equal_to_one_device(vae, function, rows):
    options = MESHES[rows]
    latents = normal(1, 3, rows, 4, vae.config.latent_channels)
    x = jit(streaming.decode)(vae, latents) if function is streaming.encode else latents
    expected = jit(function)(vae, x)
    mesh = options.build()
    with jax.set_mesh(mesh):
        vae = jax.device_put(vae, NamedSharding(mesh, PartitionSpec()))
        compiled = jit(function).lower(vae, x).compile()
        y = compiled(vae, x)
    b, t, h, w, c = y.shape
    shared = h if h % 2 else h // 2
    assert y.sharding.shard_shape(y.shape) == (b, t, shared, w // options.context, c)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    program = compiled.as_text()
    assert "collective-permute" in program
    if rows % 2:
        return
    # Frames are never gathered: what is, is of the size of latents, for the attention within them.
    gathered = [shape.split(",") for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program)]
    assert all(math.prod(map(int, shape)) <= rows * 4 * 3 * 8 for shape in gathered)


@pytest.mark.parametrize(
    "spare",
    [{"data": 4, "context": 1}, pytest.param({"data": 1, "context": 4}, marks=pytest.mark.slow)],
)
def test_gradients_are_those_of_one_device(spare):
    """`spare`: the second mesh has an axis that nothing is cut by; copies must not be summed."""
    config = dataclasses.replace(
        CONFIGS["as Wan 2.2"], num_res_blocks=1, dim_mult=(1, 2), temporal_downsample=(True,)
    )
    vae = random_module(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    video = normal(1, 1 + config.temporal_factor, 8, 16, 3)
    graphdef, params, buffers = nnx.split(vae, nnx.Param, ..., graph=False)

    def loss(params, video):
        model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, buffers))
        return (model.decode_raw(model.posterior(video).mean) ** 2).mean()

    expected = jit(jax.grad(loss))(params, video)
    with jax.set_mesh(MeshOptions(tensor=2, **spare).build()):
        found = jit(jax.grad(loss))(params, video)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(np.abs(b).max()))
