"""Denoiser under two conditions, and what is kept between steps, on networks whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.steps import Stateless, take_step
from vidgen.core.streams import TEXT, Stream
from vidgen.models.dit.config import DiTConfig
from vidgen.sampling.guidance import AdaptiveProjected, ClassifierFree
from vidgen.sampling.network import Conditional, Denoiser, Guided, TransformerDenoiser
from vidgen.sampling.sampler import sample
from vidgen.sampling.steppers import DPMSolver, Euler, Heun
from vidgen.sampling.time_grid import TimeGrid

X = jnp.arange(4.0).reshape(2, 1, 1, 2, 1)
POSITIVE = {"text": jnp.asarray([1.0, 2.0]), "mask": jnp.asarray([True, False])}
NEGATIVE = {"text": jnp.asarray([-3.0, 5.0]), "mask": jnp.asarray([True, True])}
STEP = jnp.asarray(0)
PLAIN = ClassifierFree()


def velocity(x, t, condition):
    assert condition["mask"].dtype == bool
    wide = lambda v: v.reshape(-1, 1, 1, 1, 1)  # noqa: E731
    return x * wide(condition["text"]) + wide(t) + wide(condition["mask"])


def guided(denoiser, steps=(True,), guidance=PLAIN, scale=4.0):
    return Guided(
        denoiser=denoiser,
        positive=POSITIVE,
        negative=NEGATIVE,
        guidance=guidance,
        scale=scale,
        steps=np.asarray(steps),
    )


def test_one_pass_of_twice_the_batch():
    calls = []

    def counted(x, t, condition):
        calls.append((x.shape, t.tolist()))
        return velocity(x, t, condition)

    network, t = guided(Stateless(counted)), jnp.asarray([0.2, 0.6])
    found, _ = network.apply(X, t, network.init(X), STEP)
    positive, negative = velocity(X, t, POSITIVE), velocity(X, t, NEGATIVE)
    np.testing.assert_allclose(found, negative + 4.0 * (positive - negative), rtol=1e-6)
    assert calls == [((4, 1, 1, 2, 1), pytest.approx([0.2, 0.6, 0.2, 0.6]))]


@dataclasses.dataclass(frozen=True)
class Counting:
    """Denoiser that keep how often each row was computed."""

    rows: list

    def init(self, latents):
        return jnp.zeros(len(latents))

    def apply(self, latents, timestep, condition, state, step):
        count = len(latents)
        jax.debug.callback(lambda step: self.rows.append((int(step), count)), step)
        return velocity(latents, timestep, condition), state + 1.0


def test_steps_without_guidance_cost_half():
    rows, steps = [], (False, True, True, False)
    network = guided(Counting(rows), steps)

    @jax.jit
    def run(x):
        def body(state, step):
            velocity, state = network.apply(x, jnp.full(2, 0.5), state, step)
            return state, velocity

        return jax.lax.scan(body, network.init(x), jnp.arange(4))

    (kept, _), velocities = run(X)
    jax.effects_barrier()
    assert sorted(rows) == [(0, 2), (1, 4), (2, 4), (3, 2)]
    # The negative prompt's part of what is kept stays as it was.
    assert kept.tolist() == [4, 4, 2, 2]
    t = jnp.full(2, 0.5)
    positive, negative = velocity(X, t, POSITIVE), velocity(X, t, NEGATIVE)
    for found, is_guided in zip(velocities, steps, strict=True):
        expected = negative + 4.0 * (positive - negative) if is_guided else positive
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_only_steps_in_between_are_guided_and_the_result_is_that_of_both_networks_in_turn():
    grid, t = TimeGrid(num_steps=3), jnp.asarray(TimeGrid(num_steps=3).timesteps())
    found = sample(guided(Stateless(velocity), (False, True, False)), X, grid=grid, stepper=Euler())
    x = X
    for i, network in enumerate(
        (
            Conditional(denoiser=Stateless(velocity), condition=POSITIVE),
            guided(Stateless(velocity)),
        )
    ):
        x = x + (t[i + 1] - t[i]) * network.apply(x, jnp.full(2, t[i]), network.init(x), STEP)[0]
    x = x + (t[3] - t[2]) * velocity(x, jnp.full(2, t[2]), POSITIVE)
    np.testing.assert_allclose(found, x, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Remembering:
    """Velocity 1 + number of steps done; keeps that number, and at which timestep it was last counted."""

    def init(self, latents):
        return {"count": jnp.zeros(()), "t": jnp.ones(())}

    def apply(self, latents, timestep, state, step):
        state = {"count": state["count"] + 1.0, "t": timestep[0]}
        return jnp.full_like(latents, 1.0) * state["count"], state


@pytest.mark.parametrize("stepper", [Euler(), Heun()], ids=str)
def test_a_step_counts_once_however_often_the_stepper_calls(stepper):
    """Both of Heun's calls are of one field; what its second one leaves is not kept."""
    found = sample(Remembering(), X, grid=TimeGrid(num_steps=4), stepper=stepper)
    np.testing.assert_allclose(found, X - 0.25 * (1 + 2 + 3 + 4), rtol=1e-6)


@pytest.mark.parametrize("stepper", [Heun(), DPMSolver()], ids=str)
def test_momentum_passes_through_the_scan_as_through_a_loop(stepper):
    network = guided(Stateless(velocity), guidance=AdaptiveProjected(momentum=-0.7, norm_threshold=2.0))
    grid = TimeGrid(num_steps=3)
    found = sample(network, X, grid=grid, stepper=stepper)
    t = jnp.asarray(grid.timesteps())
    x, state, kept = X, stepper.init(X), network.init(X)
    for i in range(3):
        at_start = kept

        def call(x, timestep, i=i, at_start=at_start):
            return network.apply(x, timestep, at_start, jnp.asarray(i))[0]

        kept = network.apply(x, jnp.full(2, t[i]), at_start, jnp.asarray(i))[1]
        x, state = take_step(stepper, call, x, state, t[i], t[i + 1])
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
    forgetful = guided(Stateless(velocity), guidance=AdaptiveProjected(momentum=0.0, norm_threshold=2.0))
    assert np.abs(sample(forgetful, X, grid=grid, stepper=stepper) - found).max() > 1e-3


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Records the tokens of its calls; its velocity is the timestep of each sequence."""

    calls: list
    config: DiTConfig = DiTConfig()

    def __call__(self, tokens, timestep, streams, cache=None):
        self.calls.append(tokens)
        return jnp.zeros_like(tokens.patches) + timestep[..., None], cache


def test_the_transformer_gets_the_known_patches_with_each_condition():
    calls, random = [], np.random.default_rng(0)
    x, known = (jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    mask = jnp.asarray([[True, False, False], [False, False, True]])
    denoiser = TransformerDenoiser(
        transformer=Transformer(calls),
        positions=np.zeros((1, 3, 3), np.int32),
        known_patches=known,
        known_mask=mask,
    )
    assert isinstance(denoiser, Denoiser)
    one, two = ({TEXT: Stream(jnp.full((2, 1, 1), value))} for value in (1.0, 2.0))
    network = Guided(
        denoiser=denoiser, positive=one, negative=two, guidance=PLAIN, scale=2.0, where=~mask[..., None]
    )
    velocity, _ = network.apply(x, jnp.asarray([0.2, 0.6]), network.init(x), STEP)
    (tokens,) = calls
    np.testing.assert_array_equal(tokens.known_mask, jnp.tile(mask, (2, 1)))
    np.testing.assert_array_equal(tokens.patches, np.tile(np.where(mask[..., None], known, x), (2, 1, 1)))
    expected = np.where(mask[..., None], 0.0, np.float32([[[0.2]], [[0.6]]]))
    np.testing.assert_allclose(velocity, np.broadcast_to(expected, x.shape), rtol=1e-6)
