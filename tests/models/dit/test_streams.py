"""Streams besides text and images: how each enters, and what packed clips see of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.dit.call import grid_tokens
from tests.models.random_weights import random_module
from vidgen.core.errors import UserError
from vidgen.core.streams import TEXT, Stream
from vidgen.core.tokens import Tokens
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import DiTConfig, StreamConfig
from vidgen.models.dit.model import DiT

PLAIN = DiTConfig(in_channels=3, model_dim=24, num_layers=2, num_heads=2, ffn_dim=32, text_dim=10, freq_dim=8)
CONFIG = dataclasses.replace(
    PLAIN,
    streams=(
        StreamConfig(name="boxes", dim=5),
        StreamConfig(name="depth", dim=6, enters="token"),
        StreamConfig(name="camera", dim=7, enters="modulation"),
    ),
)
SIZES = (2, 4, 4), (1, 4, 4)
"""Latents of two clips: 8 tokens and 4."""
TIMES = jnp.asarray([[0.3], [0.9]])
# Compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def clips():
    """Tokens and streams of each clip; one box and one word of the first are masked."""
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    made = []
    for size, count in zip(SIZES, (3, 2), strict=True):
        tokens = grid_tokens(CONFIG, array(1, *size, 3))
        mask = jnp.asarray([[True, True, count == 2]][:count])[:, :count]
        streams = {
            TEXT: Stream(array(1, count, 10), mask),
            "boxes": Stream(array(1, count, 5), mask),
            "depth": Stream(array(1, tokens.patches.shape[1], 6)),
            "camera": Stream(array(1, 1, 7)),
        }
        made.append((tokens, streams))
    return made


@pytest.fixture(scope="module")
def apply():
    return jit(lambda model, tokens, timestep, streams: model(tokens, timestep, streams)[0])


def test_with_initial_weights_they_have_no_influence(model, clips, apply):
    tokens, streams = clips[0]
    initial = named_leaves(jit(lambda: nnx.state(DiT(CONFIG, rngs=nnx.Rngs(0)), graph=False))())
    plain = random_module(lambda: DiT(PLAIN, rngs=nnx.Rngs(0)))
    trained = named_leaves(nnx.state(plain, graph=False))
    leaves = [trained.get(name, leaf) for name, leaf in initial.items()]
    assert len(trained) < len(leaves) == len(named_leaves(nnx.state(model, graph=False)))
    extended = jax.tree.unflatten(jax.tree.structure(model), leaves)
    expected = apply(plain, tokens, TIMES[:1], {TEXT: streams[TEXT]})
    np.testing.assert_array_equal(apply(extended, tokens, TIMES[:1], streams), expected)


@pytest.mark.parametrize("name", ["boxes", "depth", "camera"])
def test_each_has_an_influence_but_not_where_it_is_masked(model, clips, apply, name):
    tokens, streams = clips[0]
    there = apply(model, tokens, TIMES[:1], streams)
    changed = streams[name]._replace(features=streams[name].features.at[:, 0].add(1.0))
    assert np.abs(apply(model, tokens, TIMES[:1], streams | {name: changed}) - there).max(-1).min() > 1e-4
    if streams[name].mask is not None:
        hidden = jnp.where(streams[name].mask[..., None], streams[name].features, 100.0)
        masked = streams | {name: streams[name]._replace(features=hidden)}
        np.testing.assert_array_equal(apply(model, tokens, TIMES[:1], masked), there)


def test_packed_clips_see_their_own(model, clips, apply):
    (first, of_first), (second, of_second) = clips
    padded = lambda *parts: jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, 2), (0, 0)))  # noqa: E731
    tokens = Tokens(
        padded(first.patches, second.patches),
        padded(first.positions, second.positions),
        clip_ids=jnp.asarray([[1] * 8 + [2] * 4 + [0] * 2]),
    )
    streams = {}
    for name in (TEXT, "boxes"):
        one, two = of_first[name], of_second[name]
        features, mask = (jnp.concatenate(parts, axis=1) for parts in zip(one[:2], two[:2], strict=True))
        streams[name] = Stream(features, mask, jnp.asarray([[1, 1, 1, 2, 2]]))
    streams["depth"] = Stream(padded(of_first["depth"].features, of_second["depth"].features))
    cameras = [of_clip["camera"].features for of_clip in (of_first, of_second)]
    streams["camera"] = Stream(jnp.concatenate(cameras, axis=1))
    packed = apply(model, tokens, TIMES.T, streams)
    for (alone, of_clip), time, place in zip(clips, TIMES, (slice(8), slice(8, 12)), strict=True):
        expected = apply(model, alone, time[None], of_clip)
        np.testing.assert_allclose(packed[:, place], expected, rtol=1e-4, atol=1e-5)


def test_streams_that_are_missing_unknown_or_of_another_length(model, clips):
    tokens, streams = clips[0]
    call = lambda streams: model(tokens, TIMES[:1], streams)  # noqa: E731
    without = {name: stream for name, stream in streams.items() if name != "boxes"}
    with pytest.raises(UserError, match=r"the stream 'boxes' is missing, which the model needs \(streams\)"):
        call(without)
    with pytest.raises(UserError, match="no stream 'sound'; it takes text, boxes, depth, camera"):
        call(streams | {"sound": streams["boxes"]})
    with pytest.raises(UserError, match="the stream 'camera' has 3 features per sequence, and modulates 1 "):
        call(streams | {"camera": Stream(jnp.zeros((1, 3, 7)))})


@pytest.mark.parametrize("name", [TEXT, "two words"])
def test_names_that_a_stream_cannot_have(name):
    with pytest.raises(UserError, match=f"the name '{name}' must be an identifier other than text, image"):
        StreamConfig(name=name, dim=1)
    with pytest.raises(UserError, match="each needs a name of its own, found boxes, boxes"):
        dataclasses.replace(PLAIN, streams=(StreamConfig(name="boxes", dim=1),) * 2)
