"""Steps without the transformer's blocks, on a small model with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core.config import ConfigError, resolve
from vidgen.core.streams import TEXT, Stream
from vidgen.core.tokens import Tokens
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.modules import Block
from vidgen.nn.embeddings import grid_positions
from vidgen.nn.stack import apply_stack
from vidgen.sampling.caching import CachePolicy, TeaCache
from vidgen.sampling.guidance import ClassifierFree
from vidgen.sampling.network import Conditional, Denoiser, Guided, TransformerDenoiser
from vidgen.sampling.sampler import sample
from vidgen.sampling.steppers import Heun
from vidgen.sampling.time_grid import TimeGrid

SHAPE = (2, 4, 16)
POSITIONS = grid_positions(1, 2, 2)[None]
GRID = TimeGrid(num_steps=8)
TOLD = jnp.asarray(GRID.model_timesteps()[:-1])
FORCED = np.array([True] + 6 * [False] + [True])


def dit_of(dtype="float32"):
    config = DiTConfig(
        in_channels=4,
        model_dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=16,
        text_dim=8,
        freq_dim=8,
        dtype=dtype,
    )
    return random_module(lambda: DiT(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def dit():
    return dit_of()


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def condition(seed):
    return {TEXT: Stream(array(seed, 2, 4, 8), jnp.asarray([[True] * 4, [True, True, False, False]]))}


def denoiser_of(dit, computed=None):
    return TransformerDenoiser(transformer=dit, positions=POSITIONS, computed=computed)


def test_steps_are_computed_when_the_summed_change_reaches_the_threshold(dit):
    assert isinstance(TeaCache(), CachePolicy)
    modulation = np.asarray(dit.condition_embedder.time(TOLD[None])[1], np.float64).reshape(8, -1)
    change = np.abs(modulation[1:] - modulation[:-1]).sum(1) / np.abs(modulation[:-1]).sum(1)
    for power, threshold in ((1, 1.5 * change.mean()), (2, 3.5 * np.square(change).mean())):
        total, expected = 0.0, [True]
        for step in range(1, 8):
            total += change[step - 1] ** power
            expected.append(bool(total >= threshold or FORCED[step]))
            total = 0.0 if expected[-1] else total
        cache = TeaCache(threshold=float(threshold), coefficients=(1.0, 0.0, 0.0) if power == 2 else ())
        assert cache.computed(dit, TOLD, FORCED).tolist() == expected
        assert 2 < sum(expected) < 7


def test_threshold_0_computes_all_and_a_high_one_what_must_be(dit):
    computed = lambda **options: TeaCache(**options).computed(dit, TOLD, FORCED)  # noqa: E731
    assert computed(threshold=0.0).all() and computed(threshold=0.0, coefficients=(-1.0, 0.0)).all()
    assert computed(threshold=1e9).tolist() == FORCED.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_blocks_added_is_added_again(dtype):
    dit, text = dit_of(dtype), condition(0)
    first, second = array(1, 2, *SHAPE)
    t = jnp.asarray([[0.9, 0.9], [0.7, 0.7]])
    denoiser = denoiser_of(dit, jnp.asarray([True, False]))
    assert isinstance(denoiser, Denoiser)
    velocity = lambda x, t: dit(Tokens(x, POSITIONS), t[:, None], text)[0]  # noqa: E731

    one, state = denoiser.apply(first, t[0], text, denoiser.init(first), jnp.asarray(0))
    two, _ = denoiser.apply(second, t[1], text, state, jnp.asarray(1))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    np.testing.assert_allclose(one, velocity(first, t[0]), **tolerance)
    x, _, _, conditions = dit.embed(Tokens(first, POSITIONS), t[0][:, None], text)
    added = apply_stack(dit.blocks, x, Block.__call__, **conditions)[0] - x
    x, embedded, _, _ = dit.embed(Tokens(second, POSITIONS), t[1][:, None], text)
    expected = dit.head(x + added, embedded).astype(jnp.float32)
    np.testing.assert_allclose(two, expected, **tolerance)
    assert np.abs(two - velocity(second, t[1])).max() > 0.1


@pytest.mark.parametrize("guided", [True, False])
def test_with_every_step_computed_a_trajectory_is_that_of_the_model(dit, guided):
    """Of a stepper with two calls per step."""

    def run(denoiser):
        if not guided:
            return Conditional(denoiser=denoiser, condition=condition(0))
        steps = np.array([False, True, True, False, False, True, False, False])
        return Guided(
            denoiser=denoiser,
            positive=condition(0),
            negative=condition(1),
            guidance=ClassifierFree(),
            scale=3.0,
            steps=steps,
        )

    @jax.jit
    def trajectories(dit, noise):
        cached = denoiser_of(dit, TeaCache(threshold=0.0).computed(dit, TOLD, FORCED))
        return tuple(sample(run(one), noise, grid=GRID, stepper=Heun()) for one in (cached, denoiser_of(dit)))

    found, expected = trajectories(dit, array(2, *SHAPE))
    np.testing.assert_array_equal(found, expected)


def test_thresholds_that_are_none():
    with pytest.raises(ConfigError, match=r"threshold: found -0\.1 of type float, expected a number from 0"):
        resolve(TeaCache, {"threshold": -0.1})
