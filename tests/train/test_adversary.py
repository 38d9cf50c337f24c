import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from tests.train.small_vae import ADVERSARIAL, ADVERSARY, FRAMES, PLAIN, SIDE
from vidgen.core import pixels
from vidgen.core.tree import named_leaves
from vidgen.models.discriminator.model import Discriminator
from vidgen.nn.variables import Buffer
from vidgen.train.adversary import Adversary, hinge, lecam, r1, with_gradient
from vidgen.train.task import Context
from vidgen.train.vae_task import Videos

NOW = jnp.asarray(7)


def uniform(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def discriminator(seed=0):
    return random_module(lambda: Discriminator(ADVERSARY.discriminator, rngs=nnx.Rngs(0)), seed)


def module(seed=0):
    return random_module(lambda: ADVERSARIAL.build(nnx.Rngs(0)), seed)


def batch(rows=2):
    video = np.random.default_rng(5).integers(0, 256, (rows, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    return {"video": jnp.asarray(video)}


def test_hinge_and_lecam_by_hand():
    real, fake = jnp.asarray([2.0, 0.5, -1.0]), jnp.asarray([-3.0, 0.0, 1.0])
    assert float(hinge(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    found = lecam(real, fake, jnp.asarray(1.0), jnp.asarray(-2.0))
    assert float(found) == pytest.approx((16 + 6.25 + 1) / 3 + (16 + 1 + 0) / 3)


def test_r1_is_the_gradient_of_each_clips_logits():
    model, video = discriminator(), uniform(2, 3, 4, 4, 3)
    jacobian = jax.jit(jax.jacrev(lambda clip: model(clip[None])[0]))
    jacobians = [np.asarray(jacobian(clip), np.float64) for clip in video]
    logits = int(np.prod(jacobians[0].shape[:3]))
    assert logits == 8
    expected = [np.square(j.reshape(logits, -1).sum(0)).sum() / logits for j in jacobians]
    assert float(jax.jit(r1)(model, video)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_r1_teaches_the_discriminator():
    model, video = discriminator(), uniform(1, 3, 4, 4, 3)
    gradient = jax.jit(jax.grad(lambda kernel, model: r1(_with(model, kernel), video)))(
        model.out.kernel[...], model
    )
    # The penalty is quadratic in the last layer, whose derivative along itself is then twice the penalty.
    along = float((gradient * model.out.kernel[...]).sum())
    assert along == pytest.approx(2 * float(jax.jit(r1)(model, video)), rel=1e-4)


def _with(model, kernel):
    copy = jax.tree.map(lambda x: x, model)
    copy.out.kernel[...] = kernel
    return copy


def test_a_value_with_its_gradient():
    x, scale = uniform(3, 4), jnp.asarray(2.0)

    def function(scale):
        return lambda x: (scale * jnp.sin(x).sum(), {"max": x.max()})

    value, metrics, gradient = with_gradient(function(scale), x)
    np.testing.assert_allclose(value, 2 * np.sin(x).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * np.cos(x), rtol=1e-6)
    assert float(metrics["max"]) == float(x.max())
    passed = jax.grad(lambda x: with_gradient(function(scale), jnp.square(x))[0])(x)
    np.testing.assert_allclose(passed, 2 * np.cos(np.square(x)) * 2 * x, rtol=1e-5)
    assert float(jax.grad(lambda scale: with_gradient(function(scale), x)[0])(scale)) == 0.0


def gradients(task, model, step=NOW):
    """Loss, metrics, gradients and buffers by name, as the step has them."""
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer, graph=False)

    @jax.jit
    def run(params, buffers, video, step):
        def loss(params):
            merged = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, buffers))
            context = Context(model=merged, batch=Videos(video), key=jax.random.key(3), step=step)
            loss, metrics = task.loss(context)
            return loss, (metrics, nnx.state(merged, Buffer, graph=False))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (metrics, after)), grads = run(params, buffers, batch()["video"], step)
    return float(loss), metrics, named_leaves(grads), named_leaves(after)


@jax.jit
def two_passes(model, video):
    """Gradients of the VAE and of the discriminator from two losses, written out."""
    video = pixels.to_float(video)

    def reconstruct(vae):
        posterior = vae.posterior(video)
        return posterior, vae.decode_raw(posterior.sample(jax.random.key(3)))

    def comparison(made):
        return jnp.abs(made - video).mean() + jnp.square(made - video).mean()

    def judged(made):
        return -model.discriminator(made).mean()

    still = reconstruct(model.vae)[1]
    norms = [jnp.linalg.norm(jax.grad(f)(still).ravel()) for f in (comparison, judged)]

    def generator(vae):
        posterior, made = reconstruct(vae)
        ratio = norms[0] / norms[1]
        return comparison(made) + 1e-2 * posterior.kl() + 0.5 * ratio * judged(made)

    def discriminator(network):
        real, fake = network(video), network(still)
        loss = 0.5 * (jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean())
        sums = jax.grad(lambda x: network(x).sum())(video)
        loss += 0.5 * 0.1 * jnp.square(sums).sum() / real.size
        # The averages of a first batch are its means.
        a, b = jax.lax.stop_gradient((real.mean(), fake.mean()))
        return loss + 0.2 * (jnp.square(real - b).mean() + jnp.square(fake - a).mean())

    return (
        jax.grad(generator)(model.vae),
        jax.grad(discriminator)(model.discriminator),
        norms[0] / norms[1],
    )


def first(model):
    """With averages of nothing yet."""
    network = model.discriminator
    network.real_logit, network.fake_logit, network.count = (Buffer(jnp.zeros(())) for _ in range(3))
    return model


def test_one_backward_pass_gives_the_gradients_of_two():
    model = first(module())
    # Some logits beyond the margin: within it the hinge pulls as many up as down, and the bias nowhere.
    bias = model.discriminator.out.bias
    bias.set_value(bias[...] + 1.0 - model.discriminator(pixels.to_float(batch()["video"])).mean())
    _, metrics, grads, after = gradients(ADVERSARIAL, model)
    vae, network, ratio = two_passes(model, batch()["video"])
    expected = {f"vae.{name}": g for name, g in named_leaves(nnx.state(vae, nnx.Param, graph=False)).items()}
    expected |= {
        f"discriminator.{name}": g
        for name, g in named_leaves(nnx.state(network, nnx.Param, graph=False)).items()
    }
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        size = np.abs(expected[name]).max()
        assert size > 0, name
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5 * size, rtol=1e-4, err_msg=name)
    assert float(metrics["gan/ratio"]) == pytest.approx(float(ratio), rel=1e-5)
    assert float(after["discriminator.real_logit"]) == pytest.approx(float(metrics["gan/real_logit"]))
    assert float(after["discriminator.fake_logit"]) == pytest.approx(float(metrics["gan/fake_logit"]))


def test_before_its_start_it_is_as_if_it_were_not_there():
    task = dataclasses.replace(ADVERSARIAL, adversary=dataclasses.replace(ADVERSARY, start_step=8))
    model = module()
    loss, metrics, grads, after = gradients(task, model, jnp.asarray(7))
    plain_loss, plain_metrics, plain_grads, plain_after = gradients(PLAIN, model.vae)
    assert loss == pytest.approx(plain_loss, rel=1e-7)
    for name, gradient in plain_grads.items():
        np.testing.assert_allclose(grads[f"vae.{name}"], gradient, rtol=1e-6, atol=1e-9, err_msg=name)
    for name, value in grads.items():
        assert name.startswith("vae.") or not np.any(value)
    for name, value in plain_after.items():
        np.testing.assert_array_equal(after[f"vae.{name}"], value)
    assert float(after["discriminator.real_logit"]) == float(model.discriminator.real_logit[...])
    assert {name for name in metrics if not name.startswith("gan/")} == set(plain_metrics)
    assert not any(float(value) for name, value in metrics.items() if name.startswith("gan/"))
    # And from then on it is all there.
    started, always = gradients(task, model, jnp.asarray(8)), gradients(ADVERSARIAL, model)
    assert started[0] == pytest.approx(always[0], rel=1e-6)
    for name, gradient in always[2].items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(started[2][name], gradient, rtol=1e-4, atol=1e-5 * size, err_msg=name)
    for name, value in always[3].items():
        np.testing.assert_allclose(started[3][name], value, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_adaptive_weight_is_a_fraction_of_the_reconstructions_gradient(size):
    model, video, made = discriminator(), uniform(2, 3, 4, 4, 3), uniform(2, 3, 4, 4, 3, seed=1)
    wanted = size * uniform(2, 3, 4, 4, 3, seed=2)
    found = jax.jit(jax.grad(lambda made: ADVERSARY.loss(_copy(model), video, made, wanted, NOW)[0]))(made)
    np.testing.assert_allclose(np.linalg.norm(found), 0.5 * np.linalg.norm(wanted), rtol=1e-5)
    fixed = dataclasses.replace(ADVERSARY, adaptive=False)
    found = jax.jit(jax.grad(lambda made: fixed.loss(_copy(model), video, made, wanted, NOW)[0]))(made)
    expected = jax.grad(lambda made: -0.5 * model(made).mean())(made)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def _copy(model):
    return jax.tree.map(lambda x: x, model)


def test_options_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="start_step is -1"):
        Adversary(start_step=-1)
    with pytest.raises(ValueError, match="lecam_decay is 1"):
        Adversary(lecam_decay=1.0)


def test_terms_of_weight_zero_are_not_there():
    bare = dataclasses.replace(ADVERSARY, r1_weight=0.0, lecam_weight=0.0)
    metrics = jax.eval_shape(lambda: bare.loss(discriminator(), *(jnp.zeros((1, 1, 4, 4, 3)),) * 3, NOW)[1])
    assert set(metrics) == {"gan/discriminator", "gan/real_logit", "gan/fake_logit", "gan/ratio"}
