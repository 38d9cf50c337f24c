"""I3D against the same network written out in torch, with the names of the port to PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.random_weights import random_module
from vidgen.ckpt.weights import WeightsError, save_weights
from vidgen.core.tree import count, named_leaves
from vidgen.models.i3d.model import I3D, Unit, resize
from vidgen.models.i3d.params import i3d_names, load_i3d

# Compiling takes longer than running.
features = jax.jit(lambda model, x: model(x), compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def model():
    made = random_module(lambda: I3D(rngs=nnx.Rngs(0)))

    def positive(name, leaf):
        return jnp.exp(leaf) if name.endswith("variance") else leaf

    leaves = [positive(name, leaf) for name, leaf in named_leaves(made).items()]
    return jax.tree.unflatten(jax.tree.structure(made), leaves)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    state = nnx.state(model, graph=False)
    save_weights(path, state, names=i3d_names(named_leaves(state)))
    return path


def with_torch(torch, tensors, video):
    """The logits' mean over time of a video `b 3 t h w` of 224 x 224."""
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}

    def pad(x, size, strides):
        sides = []
        for length, k, s in zip(x.shape[2:], size, strides, strict=True):
            total = max(k - (length % s or s), 0)
            sides = [total // 2, total - total // 2, *sides]
        return functional.pad(x, sides)

    def unit(x, name, strides=(1, 1, 1)):
        weight = tensors[f"{name}.conv3d.weight"]
        x = functional.conv3d(pad(x, weight.shape[2:], strides), weight, stride=strides)
        kinds = ("running_mean", "running_var", "weight", "bias")
        return functional.relu(
            functional.batch_norm(x, *(tensors[f"{name}.bn.{kind}"] for kind in kinds), eps=1e-3)
        )

    def pool(x, size, strides):
        return functional.max_pool3d(pad(x, size, strides), size, strides)

    def mixed(x, name):
        ways = [unit(x, f"{name}.b0")]
        ways += [unit(unit(x, f"{name}.{b}a"), f"{name}.{b}b") for b in ("b1", "b2")]
        return torch.cat([*ways, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    x = pool(unit(video, "Conv3d_1a_7x7", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = mixed(mixed(x, "Mixed_3b"), "Mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, f"Mixed_4{letter}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    x = mixed(mixed(x, "Mixed_5b"), "Mixed_5c")
    x = functional.avg_pool3d(x, (2, 7, 7), stride=1)
    x = functional.conv3d(x, tensors["logits.conv3d.weight"], tensors["logits.conv3d.bias"])
    return x.squeeze(4).squeeze(3).mean(2)


# 11 frames become 6, 3 and 2; 18 become 9, 5 and 3, two windows for the last average.
@pytest.mark.parametrize(("frames", "height", "width"), [(11, 40, 60), (18, 224, 224)])
def test_against_torch(model, path, frames, height, width):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    video = np.random.default_rng(frames).uniform(-1, 1, (1, frames, height, width, 3)).astype(np.float32)
    size = (frames, 224, 224)
    given = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
    given = torch.nn.functional.interpolate(given, size, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(resize(jnp.asarray(video)), given.numpy().transpose(0, 2, 3, 4, 1), atol=1e-5)
    with torch.no_grad():
        expected = with_torch(torch, load_file(path), given).numpy()
    found = features(model, video)
    assert found.shape == (1, 400) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found / expected.std(), expected / expected.std(), rtol=1e-4, atol=1e-4)


def test_a_unit_is_a_convolution_padded_at_the_end_then_normalised():
    """Of one channel that sums windows of 3 with stride 2: without torch, and counted by hand."""
    unit = Unit(1, 1, (3, 1, 1), strides=(2, 1, 1), rngs=nnx.Rngs(0))
    unit.kernel[...] = jnp.ones((3, 1, 1, 1, 1))
    unit.scale[...], unit.bias[...] = jnp.array([2.0]), jnp.array([1.0])
    unit.mean[...], unit.variance[...] = jnp.array([5.0]), jnp.array([4.0 - 1e-3])
    found = unit(jnp.arange(1.0, 7.0).reshape(1, 6, 1, 1, 1))
    np.testing.assert_allclose(
        found.ravel(), [6 - 5 + 1, 12 - 5 + 1, 11 - 5 + 1], rtol=1e-6
    )  # 1 + 2 + 3, ...
    found = unit(jnp.arange(1.0, 6.0).reshape(1, 5, 1, 1, 1))
    np.testing.assert_allclose(
        found.ravel(), [0, 9 - 5 + 1, 9 - 5 + 1], rtol=1e-6
    )  # 0 + 1 + 2, ..., 4 + 5 + 0


def test_size_is_that_of_the_paper(model):
    assert count(nnx.state(model, nnx.Param, graph=False)) == 12_697_264  # 12.7 million with 400 classes
    assert count(nnx.state(model, graph=False)) == 12_697_264 + 2 * 7_280


def test_what_is_written_loads_and_counters_of_batches_are_ignored(model, path, tmp_path):
    tensors = load_file(path)
    assert tensors["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert tensors["Mixed_4e.b2b.conv3d.weight"].shape == (64, 32, 3, 3, 3)
    assert tensors["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)
    file = tmp_path / "i3d.safetensors"
    save_file(tensors | {"Mixed_3b.b0.bn.num_batches_tracked": np.array(7)}, file)
    loaded = load_i3d(file)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded, graph=False), nnx.state(model, graph=False))


def test_tensors_that_do_not_fit_are_all_named_with_what_is_expected(path, tmp_path):
    tensors = load_file(path)
    del tensors["Mixed_5c.b3b.bn.running_var"]
    tensors["logits.conv3d.bias"] = np.zeros(600, np.float32)
    file = tmp_path / "i3d.safetensors"
    save_file(tensors | {"more": np.zeros(3, np.float32)}, file)
    with pytest.raises(WeightsError) as caught:
        load_i3d(file)
    message = str(caught.value)
    assert "3 tensors" in message and "InceptionI3d(400" in message
    assert "Mixed_5c.b3b.bn.running_var: missing in the file, expected (128,)" in message
    assert "logits.conv3d.bias: (600,) in the file, expected (400,)" in message
    assert "more: only in the file, (3,)" in message


def test_clips_that_are_too_short_are_an_error(model):
    with pytest.raises(ValueError, match="8 frames; I3D needs at least 9"):
        model(jnp.zeros((1, 8, 4, 4, 3)))
