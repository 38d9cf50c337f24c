"""The parts of the VAE's task, and whole runs of it: plain, adversarial, of the decoder alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.train import toy
from tests.train.small_vae import ADVERSARIAL, ADVERSARY, MODEL, PLAIN, Clips, train
from vidgen.ckpt.manager import CheckpointManager
from vidgen.ckpt.weights import WeightsError, save_weights
from vidgen.core import pixels
from vidgen.core.tree import named_leaves
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import lpips_names
from vidgen.models.video_vae.model import Posterior, VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import AdamW
from vidgen.train.phases import transformation
from vidgen.train.state import FrozenState, init_state
from vidgen.train.step import StepOptions, make_train_step
from vidgen.train.task import Context
from vidgen.train.vae_folder import load_vae
from vidgen.train.vae_task import VAETask, Videos
from vidgen.train.wavelets import wavelet_loss

DECODER = dataclasses.replace(ADVERSARIAL, train="decoder")
LATE = dataclasses.replace(ADVERSARIAL, adversary=dataclasses.replace(ADVERSARY, start_step=2))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, train(workdir, keep=2)


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory):
    """The discriminator enters at the third step of four."""
    workdir = tmp_path_factory.mktemp("adversarial")
    return workdir, train(workdir, LATE)


def numbers(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def assert_same(a, b):
    assert set(a) == set(b)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def losses(task, model, frozen=None, side=8):
    shape = (2, 3, side, side, 3)
    video = jnp.asarray(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))
    made = jax.jit(
        lambda model: model.decode_raw(model.posterior(pixels.to_float(video)).sample(jax.random.key(3)))
    )(model)
    run = lambda model: task.loss(  # noqa: E731
        Context(
            model=jax.tree.map(lambda x: x, model),
            frozen=frozen or {},
            batch=Videos(video),
            key=jax.random.key(3),
        )
    )
    loss, metrics = jax.jit(run)(model)
    return float(loss), metrics, np.asarray(made), np.asarray(pixels.to_float(video))


def vae():
    return random_module(lambda: VideoVAE(MODEL, rngs=nnx.Rngs(0)))


def test_the_loss_is_the_weighted_sum_of_the_terms_that_count():
    weights = {"l1_weight": 0.7, "l2_weight": 0.3, "wavelet_weight": 2.0, "wavelet_levels": 2}
    loss, metrics, made, video = losses(dataclasses.replace(PLAIN, **weights), vae())
    l1, l2 = np.abs(made - video).mean(), np.square(made - video).mean()
    wavelet = float(wavelet_loss(jnp.asarray(made), jnp.asarray(video), levels=2))
    expected = 0.7 * l1 + 0.3 * l2 + 2.0 * wavelet + 1e-2 * float(metrics["kl"])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert float(metrics["wavelet"]) == pytest.approx(wavelet, rel=1e-5)
    assert float(metrics["psnr"]) == pytest.approx(10 * np.log10(4 / l2), rel=1e-5)
    assert set(metrics) == {"l1", "l2", "wavelet", "kl", "psnr"}


def test_terms_of_weight_zero_are_absent():
    loss, metrics, made, video = losses(
        VAETask(model=MODEL, l1_weight=0.0, kl_weight=0.0, l2_weight=3.0), vae()
    )
    assert set(metrics) == {"l2", "psnr"}
    assert loss == pytest.approx(3 * np.square(made - video).mean(), rel=1e-5)


@pytest.mark.slow
def test_perceptual_weights_come_from_a_file(tmp_path):
    lpips = random_module(lambda: LPIPS(rngs=nnx.Rngs(0)))
    state = nnx.state(lpips, graph=False)
    path = tmp_path / "lpips.safetensors"
    save_weights(path, state, names=lpips_names(named_leaves(state), whole=False))
    task = VAETask(
        model=MODEL, perceptual_weight=2.0, perceptual_weights=str(path), l2_weight=0.0, kl_weight=0.0
    )
    loss, metrics, made, video = losses(task, vae(), {"lpips": task.frozen()["lpips"].load()}, side=16)
    expected = float(jax.jit(lambda a, b: lpips(a, b).mean())(made, video))
    assert float(metrics["perceptual"]) == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(np.abs(made - video).mean() + 2 * expected, rel=1e-5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises((WeightsError, ValueError), match=r"lpips\.safetensors"):
        task.frozen()["lpips"].load()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        dataclasses.replace(task, perceptual_weights="nowhere.safetensors").frozen()["lpips"].load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual_weight": 1.0}, "perceptual_weights names no file"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"wavelet_levels": 0}, "wavelet_levels is 0"),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VAETask(**options)


def test_until_it_starts_an_adversary_changes_nothing(plain, adversarial):
    lines, others = (toy.metrics(run[0]) for run in (plain, adversarial))
    assert [line["loss"] for line in others[:2]] == pytest.approx(
        [line["loss"] for line in lines[:2]], rel=1e-6
    )
    assert others[0]["gan/discriminator"] == others[1]["gan/discriminator"] == 0.0
    assert others[2]["gan/discriminator"] > 0.1 and others[2]["grad_norm/discriminator"] > 0
    assert others[3]["loss"] != pytest.approx(lines[3]["loss"], rel=1e-3)
    # After two steps the VAE is as without, the discriminator as made, and its optimizer has not moved.
    without, state = after_two(*plain), after_two(*adversarial)
    for name, value in numbers(without.params).items():
        np.testing.assert_allclose(numbers(state.params["vae"])[name], value, atol=1e-6, err_msg=name)
    rule = numbers(state.opt_state.inner_states["discriminator"])
    moments = {name: value for name, value in rule.items() if name != "inner_state.step"}
    assert len(moments) > 10 and not any(np.any(value) for value in moments.values())
    for name, value in numbers(state.params["discriminator"]).items():
        np.testing.assert_allclose(numbers(state.ema["discriminator"])[name], value, rtol=1e-6)


def after_two(workdir, last):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), last)
    with CheckpointManager(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(abstract, 2)[1]


@pytest.mark.slow
def test_resuming_an_adversarial_run_is_bit_exact(adversarial, tmp_path):
    workdir, state = adversarial

    class Crash(Exception):
        pass

    class Crashing:
        every, name = 3, "crashing"

        def __call__(self, model, frozen, *, step, workdir):
            assert isinstance(model, VideoVAE)
            raise Crash

    with pytest.raises(Crash):
        train(tmp_path, LATE, evaluators=[Crashing()])
    again = train(tmp_path, LATE)
    for part in ("params", "buffers", "ema", "opt_state"):
        assert_same(numbers(getattr(again, part)), numbers(getattr(state, part)))
    assert toy.losses(tmp_path) == toy.losses(workdir)


def test_evaluators_and_later_runs_get_the_vae_alone(adversarial):
    workdir, state = adversarial
    kept = numbers(load_vae(workdir))
    expected = numbers(state.ema["vae"]) | numbers(state.buffers["vae"])
    assert_same(expected, kept)


@pytest.mark.slow
def test_an_adversarial_run_does_not_depend_on_the_mesh(adversarial, tmp_path):
    workdir, _ = adversarial
    mesh = MeshOptions(data=2, fsdp=2, tensor=2).build()
    state = train(tmp_path, LATE, mesh=mesh)
    np.testing.assert_allclose(toy.losses(tmp_path), toy.losses(workdir), rtol=1e-4)
    kernel = state.params["discriminator"]["mid"]["kernel"].get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 3, 2, 4)  # Of four channels in and out.
    assert numbers(state.opt_state).keys() == numbers(adversarial[1].opt_state).keys()


class Descent(AdamW):
    """Plain gradient descent, whose updates are the gradients."""

    def transformation(self, num_steps):
        return optax.sgd(1.0)


EVEN = dataclasses.replace(
    ADVERSARIAL,
    adversary=dataclasses.replace(ADVERSARY, adaptive=False, lecam_weight=0.0, optimizer=Descent()),
)
"""Its loss is a mean over clips: the ratio of two norms, or a moving average, is not."""


@functools.cache
def stepper(count):
    tx = transformation(EVEN.phases, Descent(), 4)
    mesh = MeshOptions().build(jax.devices()[:1])
    state, graphdef = init_state(EVEN, tx, jax.random.key(1), mesh)
    options = StepOptions(grad_clip=None, grad_accumulation=count)
    return jax.device_get(dataclasses.replace(state, key=None)), make_train_step(
        EVEN, graphdef, {}, tx, options
    )


def one_step(count=1, change=lambda params: params):
    state, step = stepper(count)
    state = jax.tree.map(jnp.array, dataclasses.replace(state, params=change(state.params)))
    state = dataclasses.replace(state, key=jax.random.key(0))
    with jax.set_mesh(MeshOptions().build(jax.devices()[:1])):
        return step(state, FrozenState(), Videos(jnp.asarray(next(Clips(8))["video"])))


def test_accumulated_gradients_are_means_over_micro_batches(monkeypatch):
    monkeypatch.setattr(Posterior, "sample", lambda self, key: self.mean)
    start = numbers(stepper(1)[0].params)
    whole, metrics = one_step()
    parts, others = one_step(4)
    for name, value in numbers(whole.params).items():
        size = np.abs(value - start[name]).max()
        assert size > 0, name
        np.testing.assert_allclose(numbers(parts.params)[name], value, atol=1e-4 * size + 1e-7, err_msg=name)
    for name in ("loss", "gan/discriminator", "gan/r1", "l1", "grad_norm", "grad_norm/discriminator"):
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-4)
    # The averages follow both: (1 + 0) / (10 + 0) of the first weights stays.
    for name, value in numbers(parts.ema).items():
        expected = 0.1 * start[name] + 0.9 * numbers(parts.params)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_discriminator_that_is_not_finite_changes_nothing_but_the_step(monkeypatch):
    monkeypatch.setattr(Posterior, "sample", lambda self, key: self.mean)

    def broken(params):
        params = jax.tree.map(np.array, params)
        params["discriminator"]["out"]["bias"][...] = np.full(1, np.nan, np.float32)
        return params

    before = stepper(1)[0]
    after, metrics = one_step(change=broken)
    assert not np.isfinite(metrics["loss"]) and int(after.step) == 1
    assert_same(numbers(after.params["vae"]), numbers(before.params["vae"]))
    for part in ("ema", "buffers", "opt_state"):
        assert_same(numbers(getattr(after, part)), numbers(getattr(before, part)))


def test_training_the_decoder_leaves_the_encoder_as_it_is(plain, tmp_path):
    source = numbers(plain[1].ema) | numbers(plain[1].buffers)
    state = train(tmp_path, DECODER, init_from=str(plain[0]))
    still = [name for name in source if name.startswith(("encoder.", "quant_conv.", "latents_"))]
    assert len(still) > 20
    kept = numbers(load_vae(tmp_path))
    for name in still:
        np.testing.assert_array_equal(numbers(state.buffers)[f"vae.{name}"], source[name])
        np.testing.assert_array_equal(kept[name], source[name])
    assert {name.split(".")[1] for name in numbers(state.params) if name.startswith("vae.")} == {
        "decoder",
        "post_quant_conv",
    }
    for part in (state.ema, state.opt_state):
        assert not [name for name in numbers(part) if "encoder" in name or ".quant_conv" in name]
    moved = {name for name in kept if name not in still and np.any(kept[name] != source[name])}
    assert moved == source.keys() - set(still)
    assert "kl" not in toy.metrics(tmp_path)[0]
