"""LPIPS against its definition, written out: with torch where it is installed, and in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scipy import signal

from tests.models.random_weights import random_module
from vidgen.ckpt.weights import WeightsError, save_weights
from vidgen.core.tree import count, named_leaves
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import load_lpips, lpips_names

STAGES = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
distance = jit(lambda model, a, b: model(a, b))
gradient = jit(lambda model, a, b: jax.grad(lambda a: model(a, b).sum())(a))


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: LPIPS(rngs=nnx.Rngs(0)))


def written(model, path, *, whole=False):
    state = nnx.state(model, graph=False)
    save_weights(path, state, names=lpips_names(named_leaves(state), whole=whole))
    return load_file(path)


@pytest.fixture(scope="module")
def tensors(model, tmp_path_factory):
    return written(model, tmp_path_factory.mktemp("lpips") / "lpips.safetensors")


def pictures(*shape):
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, *shape, 3)).astype(np.float32)
    return a, b


def by_definition(tensors, a, b):
    """Of two pictures `h w 3`, in float64, channel by channel with scipy's correlation."""

    def features(x):
        x = (x.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        x = x.transpose(2, 0, 1)
        for number, stage in enumerate(STAGES):
            if number:
                height, width = x.shape[1] // 2, x.shape[2] // 2
                x = x[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2).max((2, 4))
            for layer in stage:
                weight, bias = tensors[f"features.{layer}.weight"], tensors[f"features.{layer}.bias"]
                sums = [signal.correlate(np.pad(x, ((0, 0), (1, 1), (1, 1))), w, "valid")[0] for w in weight]
                x = np.maximum(np.stack(sums) + bias[:, None, None], 0)
            yield x / (np.sqrt((x**2).sum(0)) + 1e-10)

    total = 0.0
    for number, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        head = tensors[f"lin{number}.model.1.weight"][0]
        total += ((x - y) ** 2 * head).sum(0).mean()
    return total


def test_against_the_definition(model, tensors):
    a, b = pictures(1, 1, 17, 22)
    found = distance(model, a, b)
    assert found.shape == (1, 1) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[0, 0], by_definition(tensors, a[0, 0], b[0, 0]), rtol=1e-5, atol=1e-5)


def test_against_torch(model, tensors):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    functional = torch.nn.functional

    def features(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift[:, None, None]) / scale[:, None, None]
        for number, stage in enumerate(STAGES):
            x = functional.max_pool2d(x, 2) if number else x
            for layer in stage:
                weight, bias = (torch.tensor(tensors[f"features.{layer}.{k}"]) for k in ("weight", "bias"))
                x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    a, b = pictures(2, 3, 37, 48)
    x, y = (torch.from_numpy(p.reshape(-1, *p.shape[2:]).transpose(0, 3, 1, 2).copy()) for p in (a, b))
    expected = torch.zeros(6)
    for number, (fx, fy) in enumerate(zip(features(x), features(y), strict=True)):
        head = torch.tensor(tensors[f"lin{number}.model.1.weight"])
        expected += functional.conv2d((fx - fy).square(), head).mean((1, 2, 3))
    expected = expected.numpy().reshape(2, 3)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(distance(model, a, b), expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_differences_and_finite_where_features_are_silent(model):
    a, b = pictures(1, 1, 16, 16)
    value = functools.partial(distance, model)
    slopes = np.asarray(gradient(model, a, b))
    direction = np.sign(slopes)
    step = 1e-2 / a.size
    slope = float((value(a + step * direction, b) - value(a - step * direction, b))[0, 0]) / (2 * step)
    np.testing.assert_allclose(np.abs(slopes).sum(), slope, rtol=2e-2)
    np.testing.assert_array_equal(value(a, a), np.zeros((1, 1)))

    # Biases this low silence every feature: the lengths that are divided by are zero.
    silent = jax.tree.map(lambda x: x - 1e4 if x.ndim == 1 else x, model)
    np.testing.assert_array_equal(gradient(silent, a, b), np.zeros_like(a))


def test_size_and_names_are_those_of_vgg16(model, tensors):
    assert count(nnx.state(model, graph=False)) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    assert tensors["features.28.weight"].shape == (512, 512, 3, 3)
    assert tensors["lin2.model.1.weight"].shape == (1, 256, 1, 1)
    assert len(tensors) == 31


@pytest.mark.parametrize("whole", [False, True])
def test_either_spelling_loads_and_what_nobody_needs_is_ignored(model, tmp_path, whole):
    path = tmp_path / "lpips.safetensors"
    tensors = written(model, path, whole=whole)
    assert ("net.slice3.12.bias" if whole else "features.12.bias") in tensors
    more = ("lins.0.model.1.weight", "scaling_layer.shift") if whole else ("classifier.0.weight",)
    save_file(tensors | dict.fromkeys(more, np.zeros((1, 2, 1, 1), np.float32)), path)
    loaded = load_lpips(path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded, graph=False), nnx.state(model, graph=False))


def test_tensors_that_do_not_fit_are_all_named_with_what_is_expected(tensors, tmp_path):
    path = tmp_path / "lpips.safetensors"
    tensors = dict(tensors)
    del tensors["features.10.weight"]
    tensors["lin4.model.1.weight"] = tensors["lin4.model.1.weight"][:, :-1]
    tensors["more"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        load_lpips(path)
    message = str(caught.value)
    assert "3 tensors" in message and "vgg16().state_dict()" in message
    assert "features.10.weight: missing in the file, expected (256, 128, 3, 3)" in message
    assert "lin4.model.1.weight: (1, 511, 1, 1) in the file, expected (1, 512, 1, 1)" in message
    assert "more: only in the file, (3,)" in message
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(WeightsError, match=r"lpips\.safetensors is no safetensors file"):
        load_lpips(path)


def test_frames_that_are_too_small_are_an_error(model):
    with pytest.raises(ValueError, match="15 x 20; LPIPS needs at least 16 x 16"):
        model(jnp.zeros((1, 1, 15, 20, 3)), jnp.zeros((1, 1, 15, 20, 3)))
