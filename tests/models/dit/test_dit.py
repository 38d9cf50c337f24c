import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.dit import reference
from tests.models.dit.call import velocity
from tests.models.random_weights import random_module
from vidgen.core.streams import TEXT
from vidgen.core.tokens import patchify
from vidgen.core.tree import count
from vidgen.models.dit.config import VARIANTS, DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.dit.modules import Block
from vidgen.models.dit.streams import AttendedStream
from vidgen.nn.embeddings import grid_positions, rope_angles
from vidgen.nn.stack import apply_stack
from vidgen.ops.key_ranges import cross_attention_ranges

CONFIG = DiTConfig(
    in_channels=3, model_dim=24, num_layers=3, num_heads=2, ffn_dim=32, text_dim=10, freq_dim=8
)
SIZE = (2, 4, 4)  # 2 x 2 x 2 tokens
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    """Latents, timesteps of tokens, text and its mask, for two clips."""
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.normal(size=(2, *SIZE, 3)), jnp.float32),
        jnp.asarray(rng.uniform(size=(2, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 5, 10)), jnp.float32),
        jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool),
    )


@pytest.fixture(scope="module")
def apply():
    return jit(velocity)


def test_against_numpy(model, inputs, apply):
    expected = reference.velocity(model, *map(np.asarray, inputs))
    assert expected.std() > 0.1
    np.testing.assert_allclose(apply(model, *inputs), expected, rtol=1e-3, atol=1e-4)


def test_timesteps_that_several_tokens_share_are_those_of_each_token(model, inputs, apply):
    latents, _, text, mask = inputs
    levels, rng = jnp.asarray([[0.3, 0.8, 0.1], [0.9, 0.2, 0.5]]), np.random.default_rng(3)
    ids = jnp.asarray(rng.integers(0, 3, (2, 8)), jnp.int32)
    per_token = lambda ids: apply(model, latents, jnp.take_along_axis(levels, ids, axis=1), text, mask)  # noqa: E731
    shared = apply(model, latents, levels, text, mask, time_ids=ids)
    np.testing.assert_allclose(shared, per_token(ids), rtol=1e-4, atol=1e-5)
    of_clips = apply(model, latents, levels[:, 0], text, mask)
    np.testing.assert_allclose(of_clips, per_token(jnp.zeros_like(ids)), rtol=1e-4, atol=1e-5)
    assert np.abs(shared - of_clips).max() > 1e-2


def test_known_tokens_have_timestep_0_and_no_velocity(model, inputs, apply):
    latents, _, text, mask = inputs
    t, known_mask = jnp.asarray([0.3, 0.9]), jnp.tile(jnp.arange(8) < 4, (2, 1))
    found = apply(model, latents, t, text, mask, known_mask=known_mask)
    assert (found[:, 0] == 0).all() and (found[:, 1] != 0).all()
    clean = jnp.where(known_mask, 0.0, t[:, None])
    np.testing.assert_allclose(
        found[:, 1], apply(model, latents, clean, text, mask)[:, 1], rtol=1e-4, atol=1e-5
    )


def test_a_chunk_depends_on_no_later_chunk(model, inputs, apply):
    """Each latent frame is a chunk."""
    latents, _, text, mask = inputs
    t, chunk_ids = jnp.asarray([0.3, 0.9]), jnp.tile(jnp.repeat(jnp.arange(2), 4), (2, 1))
    call = lambda latents: apply(model, latents, t, text, mask, chunk_ids=chunk_ids)  # noqa: E731
    there, late, early = call(latents), call(latents.at[:, 1].add(1.0)), call(latents.at[:, 0].add(1.0))
    np.testing.assert_array_equal(late[:, 0], there[:, 0])
    assert np.abs(late - there)[:, 1].min() > 0 and np.abs(early - there).min((2, 3, 4)).min() > 0
    # An image, whose only chunk is the first, is the first chunk of the video.
    alone = apply(model, latents[:, :1], t, text, mask)
    np.testing.assert_allclose(there[:, :1], alone, rtol=1e-4, atol=1e-5)


def test_padding_of_the_text_has_no_influence_and_its_words_have(model, inputs, apply):
    latents, t, text, mask = inputs
    there = apply(model, latents, t, text, mask)
    padding = jnp.where(mask[:, :, None], text, 100.0)
    np.testing.assert_array_equal(apply(model, latents, t, padding, mask), there)
    changed = apply(model, latents, t, text.at[0, 2].add(1.0), mask)
    assert np.abs(changed - there)[0].max() > 1e-3
    np.testing.assert_array_equal(changed[1], there[1])


def test_each_token_sees_all_others_of_its_clip(model, inputs, apply):
    latents, *rest = inputs
    there = apply(model, latents, *rest)
    changed = np.abs(apply(model, latents.at[0, 1, 3, 3].add(1.0), *rest) - there)
    assert patchify(jnp.asarray(changed), (1, 2, 2))[0].max(-1).min() > 1e-4
    assert not changed[1].any()


def test_the_stack_is_its_layers_one_by_one(model, inputs):
    _, t, text, mask = inputs
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 24)), jnp.float32)
    angles = rope_angles(grid_positions(2, 2, 2)[None], 12)

    @jit
    def both(model):
        _, modulation = model.condition_embedder.time(t)
        extra = {
            "modulation": modulation,
            "time_ids": jnp.tile(jnp.arange(8), (2, 1)),
            "angles": angles,
            "token_ranges": None,
            "streams": {
                TEXT: AttendedStream(
                    model.condition_embedder.text(text), cross_attention_ranges(8, key_mask=mask)
                )
            },
        }
        y = x
        for index in range(3):
            y, _ = jax.tree.map(lambda leaf: leaf[index], model.blocks)(y, **extra)  # noqa: B023
        return apply_stack(model.blocks, x, Block.__call__, **extra)[0], y

    scanned, one_by_one = both(model)
    np.testing.assert_allclose(scanned, one_by_one, rtol=1e-4, atol=1e-5)


def test_velocity_is_zero_at_initialisation_and_blocks_pass_tokens_on(inputs):
    latents, t, text, mask = inputs
    make = lambda: DiT(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))  # noqa: E731
    found, modulation = jit(
        lambda: (velocity(make(), latents, t, text, mask), make().condition_embedder.time(t)[1])
    )()
    assert found.shape == latents.shape and not found.any()
    assert not modulation.any(), "gates of self-attention and feed-forward start closed"


def test_remat_does_not_change_gradients(model, inputs):
    def gradients(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        graphdef = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), graph=False)[0]
        _, state = nnx.split(model, graph=False)
        loss = lambda state: jnp.square(velocity(nnx.merge(graphdef, state), *inputs)).mean()  # noqa: E731
        return jit(jax.grad(loss))(state), jax.make_jaxpr(jax.grad(loss))(state)

    plain, plain_program = gradients("none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    assert "remat" not in str(plain_program) and "checkpoint" not in str(plain_program)
    for remat in ("dots", "offload"):
        changed, program = gradients(remat)
        assert "remat" in str(program) or "checkpoint" in str(program)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), changed, plain)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_program_of_a_step_does_not_grow_with_layers(inputs, remat):
    def program(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers, remat=remat)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), graph=False)
        loss = lambda state: jnp.square(velocity(nnx.merge(graphdef, state), *inputs)).mean()  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(state).as_text()
        assert f"tensor<{num_layers}x24x24xf32>" in text
        return re.sub(r"\d+", "", text)

    assert program(2) == program(8)


def test_bfloat16_is_close_to_float32(model, inputs, apply):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    graphdef = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), graph=False)[0]
    low = nnx.merge(graphdef, nnx.split(model, graph=False)[1])
    exact, rounded = apply(model, *inputs), apply(low, *inputs)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.03


def test_wan_has_as_many_parameters():
    make = lambda name: nnx.eval_shape(lambda: DiT(VARIANTS[name], rngs=nnx.Rngs(0)))  # noqa: E731
    assert count(nnx.state(make("wan2.1-t2v-1.3b"), nnx.Param)) == 1_418_996_800
    assert count(nnx.state(make("wan2.1-t2v-14b"), nnx.Param)) == 14_288_491_584


def test_sizes_that_do_not_fit_are_errors(model, inputs):
    latents, *rest = inputs
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) do not divide into patches of \(1, 2, 2\)"):
        velocity(model, latents[:, :, :, :3], *rest)
    with pytest.raises(ValueError, match="8 values, 2 channels of 1 x 2 x 2; the model takes 3 channels"):
        velocity(model, latents[..., :2], *rest)
    with pytest.raises(ValueError, match="model_dim=24 must be an even multiple of num_heads=8"):
        dataclasses.replace(CONFIG, num_heads=8)
