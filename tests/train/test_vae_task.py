"""The parts of the VAE's task, and whole runs of it: plain, adversarial, of the decoder alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.train import toy
from tests.train.small_vae import ADVERSARIAL, ADVERSARY, MODEL, PLAIN, Clips, train
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.ckpt.weights import WeightsError, save_weights
from vidgen.core import pixels
from vidgen.core.tree import named_leaves
from vidgen.models.lpips.model import LPIPS
from vidgen.models.lpips.params import lpips_names
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import partitioned
from vidgen.train.recent import NonFiniteLoss
from vidgen.train.state import init_state
from vidgen.train.step import StepOptions, make_train_step
from vidgen.train.vae_folder import KeepVAE, load_vae
from vidgen.train.vae_task import VAETask
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
    keep = KeepVAE(every=0)
    return workdir, train(workdir, LATE, evaluators=[keep])


def numbers(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def assert_same(a, b):
    assert set(a) == set(b)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def losses(task, model, frozen=None, side=8):
    video = np.random.default_rng(5).integers(0, 256, (2, 3, side, side, 3), dtype=np.uint8)
    made = jax.jit(
        lambda model: model.decode_raw(model.posterior(pixels.to_float(video)).sample(jax.random.key(3)))
    )(model)
    run = lambda model: task.loss(  # noqa: E731
        jax.tree.map(lambda x: x, model), frozen, {"video": video}, jax.random.key(3), jnp.asarray(0)
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


def test_perceptual_weights_come_from_a_file(tmp_path):
    lpips = random_module(lambda: LPIPS(rngs=nnx.Rngs(0)))
    state = nnx.state(lpips, graph=False)
    path = tmp_path / "lpips.safetensors"
    save_weights(path, state, names=lpips_names(named_leaves(state), whole=False))
    task = VAETask(
        model=MODEL, perceptual_weight=2.0, perceptual_weights=str(path), l2_weight=0.0, kl_weight=0.0
    )
    loss, metrics, made, video = losses(task, vae(), task.frozen(), side=16)
    expected = float(jax.jit(lambda a, b: lpips(a, b).mean())(made, video))
    assert float(metrics["perceptual"]) == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(np.abs(made - video).mean() + 2 * expected, rel=1e-5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises((WeightsError, ValueError), match=r"lpips\.safetensors"):
        task.frozen()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        dataclasses.replace(task, perceptual_weights="nowhere.safetensors").frozen()


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


def test_until_it_starts_an_adversary_changes_nothing(plain, adversarial, tmp_path):
    before = train(tmp_path, LATE, num_steps=2, optimizer=Fixed())
    without = train(tmp_path / "plain", num_steps=2, optimizer=Fixed())
    for name, value in numbers(without.params).items():
        np.testing.assert_allclose(numbers(before.params)[f"vae.{name}"], value, atol=1e-6)
    lines, others = (toy.metrics(run[0]) for run in (plain, adversarial))
    assert [line["loss"] for line in others[:2]] == pytest.approx([line["loss"] for line in lines[:2]])
    assert others[0]["gan/discriminator"] == others[1]["gan/discriminator"] == 0.0
    assert others[2]["gan/discriminator"] > 0.1 and others[2]["grad_norm/discriminator"] > 0
    # Nor is it changed: not even by its own optimizer, which then starts to warm up.
    fresh, _ = init_state(LATE, transformation(LATE), jax.random.key(0), before.step.sharding.mesh)
    assert_same(numbers(fresh.params["discriminator"]), numbers(before.params["discriminator"]))


def transformation(task):
    return partitioned(Fixed(), task.apart, 4)


def test_resuming_an_adversarial_run_is_bit_exact(adversarial, tmp_path):
    workdir, state = adversarial

    class Crash(Exception):
        pass

    class Crashing(KeepVAE):
        def __call__(self, model, frozen, *, step, workdir):
            assert isinstance(model, VideoVAE)
            raise Crash

    with pytest.raises(Crash):
        train(tmp_path, LATE, evaluators=[Crashing(every=3)])
    again = train(tmp_path, LATE)
    for part in ("params", "buffers", "ema", "opt_state"):
        assert_same(numbers(getattr(again, part)), numbers(getattr(state, part)))
    assert toy.losses(tmp_path) == toy.losses(workdir)


def test_evaluators_and_later_runs_get_the_vae_alone(adversarial):
    workdir, state = adversarial
    kept = numbers(load_vae(workdir))
    expected = numbers(state.ema["vae"]) | numbers(state.buffers["vae"])
    assert_same(expected, kept)


def test_an_adversarial_run_does_not_depend_on_the_mesh(adversarial, tmp_path):
    workdir, _ = adversarial
    mesh = MeshOptions(data=2, fsdp=2, tensor=2).build()
    state = train(tmp_path, LATE, mesh=mesh)
    np.testing.assert_allclose(toy.losses(tmp_path), toy.losses(workdir), rtol=1e-4)
    kernel = state.params["discriminator"]["mid"]["kernel"]
    assert kernel.get_value().sharding.spec == jax.sharding.PartitionSpec(None, None, None, "fsdp", "tensor")
    assert numbers(state.opt_state).keys() == numbers(adversarial[1].opt_state).keys()


class Fixed(toy.AdamW):
    """Gradient descent, whose updates show the gradients."""

    def transformation(self, num_steps):
        import optax

        return optax.sgd(1.0)


def one_step(task, state_of=None, **options):
    mesh = MeshOptions().build(jax.devices()[:1])
    tx = partitioned(Fixed(), {name: Fixed() for name in task.apart}, 4)
    state, graphdef = init_state(task, tx, jax.random.key(1), mesh)
    before = numbers(state.params)
    step = make_train_step(task, graphdef, None, tx, StepOptions(**options))
    with jax.set_mesh(mesh):
        after, metrics = step(state, None, processes.global_batch(task.arrays(next(Clips(8))), mesh))
    return {name: before[name] - value for name, value in numbers(after.params).items()}, metrics, after


def length(updates, part):
    return np.sqrt(sum(np.square(u).sum() for name, u in updates.items() if name.startswith(part)))


def test_the_vae_and_the_discriminator_are_clipped_apart():
    task = dataclasses.replace(
        ADVERSARIAL, adversary=dataclasses.replace(ADVERSARY, r1_weight=1e4, lecam_weight=0.0)
    )
    free, metrics, _ = one_step(task, grad_clip=None)
    own = length(free, "discriminator.")
    assert own > 10 and own == pytest.approx(float(metrics["grad_norm/discriminator"]), rel=1e-3)
    both = float(metrics["grad_norm"])
    assert both == pytest.approx(np.hypot(own, length(free, "vae.")), rel=1e-3)
    limit = 2 * length(free, "vae.")
    clipped, _, _ = one_step(task, grad_clip=float(limit))
    assert length(clipped, "discriminator.") == pytest.approx(limit, rel=1e-3)
    assert length(clipped, "vae.") == pytest.approx(limit / 2, rel=1e-3)


def test_accumulated_gradients_are_means_over_micro_batches(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), dtype=float: jnp.zeros(shape))
    task = dataclasses.replace(
        ADVERSARIAL, adversary=dataclasses.replace(ADVERSARY, adaptive=False, lecam_weight=0.0)
    )
    whole, metrics, _ = one_step(task, grad_clip=None)
    parts, others, state = one_step(task, grad_clip=None, grad_accumulation=4)
    for name, update in whole.items():
        size = np.abs(update).max()
        np.testing.assert_allclose(parts[name], update, atol=1e-4 * size + 1e-7, err_msg=name)
    for name in ("loss", "gan/discriminator", "gan/r1", "l1", "grad_norm"):
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-4)
    # The average follows both: (1 + 0) / (10 + 0) of the first weights stays.
    start = {name: value + parts[name] for name, value in numbers(state.params).items()}
    for name, value in numbers(state.ema).items():
        expected = 0.1 * start[name] + 0.9 * numbers(state.params)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_training_the_decoder_leaves_the_encoder_as_it_is(plain, tmp_path):
    source = numbers(plain[1].ema) | numbers(plain[1].buffers)
    state = train(tmp_path, DECODER, init_from=str(plain[0]), evaluators=[KeepVAE(every=0)])
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
    # And back: all of it goes on from there.
    whole = train(tmp_path / "whole", PLAIN, init_from=str(tmp_path), num_steps=1, optimizer=Still())
    for name, value in numbers(whole.params).items():
        np.testing.assert_array_equal(value, kept[name], err_msg=name)


class Still(toy.AdamW):
    def transformation(self, num_steps):
        import optax

        return optax.set_to_zero()


def started(workdir, task, source):
    """The state that a run begins with: one step that changes nothing."""
    still = None if task.adversary is None else dataclasses.replace(task.adversary, optimizer=Still())
    return train(
        workdir,
        dataclasses.replace(task, adversary=still),
        init_from=str(source),
        num_steps=1,
        optimizer=Still(),
    )


def test_runs_start_from_each_other_with_and_without_an_adversary(plain, adversarial, tmp_path):
    fresh, _ = init_state(
        ADVERSARIAL, transformation(ADVERSARIAL), jax.random.key(0), plain[1].step.sharding.mesh
    )
    state = started(tmp_path / "a", ADVERSARIAL, plain[0])
    assert_same(numbers(plain[1].ema), numbers(state.params["vae"]))
    assert_same(numbers(state.params["vae"]), numbers(state.ema["vae"]))
    assert_same(numbers(fresh.params["discriminator"]), numbers(state.params["discriminator"]))
    count = lambda state: float(named_leaves(state.buffers)["vae.latents_count"])  # noqa: E731
    assert count(state) == float(plain[1].buffers["latents_count"][...]) + 1
    # With a discriminator there, it goes on too; of another shape, it begins anew.
    state = started(tmp_path / "b", ADVERSARIAL, adversarial[0])
    assert_same(numbers(adversarial[1].ema), numbers(state.params))
    wider = dataclasses.replace(
        ADVERSARY, discriminator=dataclasses.replace(ADVERSARY.discriminator, base_dim=8)
    )
    state = started(tmp_path / "c", dataclasses.replace(PLAIN, adversary=wider), adversarial[0])
    assert_same(numbers(adversarial[1].ema["vae"]), numbers(state.params["vae"]))
    state = started(tmp_path / "d", PLAIN, adversarial[0])
    assert_same(numbers(adversarial[1].ema["vae"]), numbers(state.params))


def test_a_start_from_another_model_names_what_differs(plain, tmp_path):
    other = dataclasses.replace(ADVERSARIAL, model=dataclasses.replace(MODEL, latent_channels=4))
    with pytest.raises(
        CheckpointError, match=r"ema\.post_quant_conv\.bias: shape \(3,\) in the checkpoint, \(4,\)"
    ):
        started(tmp_path, other, plain[0])
    with pytest.raises(CheckpointError, match=r"ema\.up: missing in the checkpoint"):
        toy.train(tmp_path / "toy", init_from=str(plain[0]))


def test_a_loss_that_is_not_finite_stops_names_the_clips_and_saves_nothing(tmp_path):
    wild = dataclasses.replace(
        ADVERSARY, optimizer=dataclasses.replace(ADVERSARY.optimizer, learning_rate=1e30)
    )
    with pytest.raises(NonFiniteLoss, match=r"named in .*nonfinite_\d\.json"):
        train(tmp_path, dataclasses.replace(PLAIN, adversary=wild), num_steps=8, checkpoint_every=8)
    report = json.loads(next(tmp_path.glob("nonfinite_*.json")).read_text())
    assert len(report["clips"]) == 8
    with CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
