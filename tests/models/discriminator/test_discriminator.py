import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import signal

from tests.models.random_weights import random_module
from vidgen.core.tree import named_leaves
from vidgen.models.discriminator.config import VARIANTS, DiscriminatorConfig
from vidgen.models.discriminator.model import Discriminator
from vidgen.nn.variables import Buffer

TINY = VARIANTS["tiny"]


def discriminator(config=TINY, seed=0):
    return random_module(lambda: Discriminator(config, rngs=nnx.Rngs(0)), seed)


def videos(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def by_definition(module, video):
    """The network written out with scipy, in float64, for one clip [t h w c]."""

    def conv(x, layer, strides):
        kernel = np.asarray(layer.kernel[...], np.float64)
        x = np.pad(x, [((size - 1) // 2,) * 2 for size in kernel.shape[:3]] + [(0, 0)])
        planes = [
            sum(signal.correlate(x[..., i], kernel[..., i, o], mode="valid") for i in range(kernel.shape[3]))
            for o in range(kernel.shape[4])
        ]
        y = np.stack(planes, axis=-1)[:: strides[0], :: strides[1], :: strides[2]]
        return y + np.asarray(layer.bias[...], np.float64)

    x = np.asarray(video, np.float64)
    halves = module.config.temporal_downsample
    for layer, temporal in zip(module.levels, halves, strict=True):
        x = conv(x, layer, (2 if temporal else 1, 2, 2))
        x = np.where(x > 0, x, 0.2 * x)
    x = conv(x, module.mid, (1, 1, 1))
    return conv(np.where(x > 0, x, 0.2 * x), module.out, (1, 1, 1))[..., 0]


def test_against_the_definition():
    module, video = discriminator(), videos(2, 5, 8, 12, 3)
    logits = jax.jit(lambda module, video: module(video))(module, video)
    expected = np.stack([by_definition(module, clip) for clip in np.asarray(video)])
    assert logits.shape == expected.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(("frames", "logits"), [(1, 1), (2, 1), (4, 2), (5, 3), (9, 5)])
def test_any_number_of_frames(frames, logits):
    run = lambda: discriminator()(jnp.zeros((1, frames, 16, 8, 3)))  # noqa: E731
    assert jax.eval_shape(run).shape == (1, logits, 4, 2)


def test_each_clip_is_judged_by_itself_and_each_patch_sees_its_neighbourhood():
    module, video = discriminator(), videos(2, 1, 64, 64, 3)
    other = video.at[1].set(0.0).at[0, :, 48:, 48:].set(0.5)
    a, b = (np.asarray(module(x)) for x in (video, other))
    np.testing.assert_allclose(a[0, :, :8, :8], b[0, :, :8, :8], atol=1e-6)
    assert np.abs(a[0, :, 12:, 12:] - b[0, :, 12:, 12:]).max() > 1e-3


def test_it_starts_with_logits_of_moderate_size():
    run = jax.jit(lambda video: Discriminator(TINY, rngs=nnx.Rngs(0))(video))
    logits = np.asarray(run(videos(4, 5, 32, 32, 3)))
    assert 0.02 < logits.std() < 2.0 and np.abs(logits.mean()) < 2.0


def test_weights_are_float32_with_axes_and_compute_may_be_bfloat16():
    module = discriminator(DiscriminatorConfig(base_dim=8, dim_mult=(1,), temporal_downsample=(True,)))
    low = discriminator(
        DiscriminatorConfig(base_dim=8, dim_mult=(1,), temporal_downsample=(True,), dtype="bfloat16")
    )
    a, b = module(videos(1, 2, 8, 8, 3)), low(videos(1, 2, 8, 8, 3))
    assert a.dtype == b.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(a - b)).max() < 0.1
    abstract = nnx.eval_shape(lambda: Discriminator(TINY, rngs=nnx.Rngs(0)))
    for variable in jax.tree.leaves(
        nnx.state(abstract, nnx.Param, graph=False), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        assert variable.get_metadata("axes")[-1] == "conv_out"
    assert set(named_leaves(nnx.state(abstract, Buffer, graph=False))) == {
        "real_logit",
        "fake_logit",
        "count",
    }


def test_averages_are_plain_at_first_and_exponential_later():
    module = discriminator()
    module.real_logit, module.fake_logit, module.count = (Buffer(jnp.zeros(())) for _ in range(3))
    for real, fake in ((1.0, -2.0), (3.0, 0.0)):
        module.update_averages(jnp.asarray(real), jnp.asarray(fake), 0.9)
    assert float(module.real_logit[...]) == pytest.approx(2.0)
    assert float(module.fake_logit[...]) == pytest.approx(-1.0)
    module.count[...] = jnp.asarray(100.0)
    module.update_averages(jnp.asarray(12.0), jnp.asarray(-1.0), 0.9)
    assert float(module.real_logit[...]) == pytest.approx(3.0)
    assert float(module.fake_logit[...]) == pytest.approx(-1.0)


def test_frames_that_are_too_small_and_wrong_options_are_errors():
    with pytest.raises(ValueError, match=r"frames are 2 x 16; .* at least 4 x 4.*dim_mult"):
        discriminator()(jnp.zeros((1, 1, 2, 16, 3)))
    with pytest.raises(ValueError, match="one entry for each of the 2 levels"):
        DiscriminatorConfig(dim_mult=(1, 2), temporal_downsample=(True,))
    with pytest.raises(ValueError, match="dim_mult is empty"):
        DiscriminatorConfig(dim_mult=(), temporal_downsample=())
