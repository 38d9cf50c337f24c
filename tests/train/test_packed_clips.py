"""Rows of several clips give each clip what it gives alone: outputs, losses, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.dit.call import grid_tokens, velocity
from tests.models.random_weights import random_module
from tests.ops.array_shapes import array_shapes
from vidgen.core import rng
from vidgen.core.streams import TEXT, packed_stream
from vidgen.core.tokens import Tokens, patchify
from vidgen.core.tree import named_leaves
from vidgen.diffusion.rectified_flow import interpolate, velocity_loss
from vidgen.models.dit.config import VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.tokenizer import tokenize
from vidgen.nn.embeddings import grid_positions
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.sampling.conditioners import FirstFrame
from vidgen.sampling.conditioning import TrainingClips
from vidgen.train.captions import ByteCaptions
from vidgen.train.packed_clips import host_patches, pack_rows
from vidgen.train.task import Context
from vidgen.train.text_features import TextFeatures
from vidgen.train.text_to_video_task import TextToVideoTask

TASK = TextToVideoTask(
    vae="unused",
    dit=dataclasses.replace(VARIANTS["tiny"], in_channels=4, text_dim=32),
    text=ByteEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=32, max_bytes=16),
    caption_dropout=0.0,
)
S, G = 24, 3
SIZES = [[(1, 4, 4), (2, 4, 6), (2, 4, 4)], [(2, 4, 6)], [(1, 4, 4), (2, 4, 4)]]
"""Latent frames, rows and columns of the clips of three rows; the first is full, the others have padding."""


def clip(index, size):
    latents = np.random.default_rng(index).normal(size=(*size, 4)).astype(np.float32)
    return {"latents": latents, "caption": f"clip {'abc' * index}"[:16], "name": f"clip-{index}"}


COUNT = sum(map(len, SIZES))
INDICES = iter(range(COUNT))
ROWS = [[clip(next(INDICES), size) for size in row] for row in SIZES]
CLIPS = [clip for row in ROWS for clip in row]
PLACES = [(r, g) for r, row in enumerate(SIZES) for g in range(len(row))]
TIMES = np.linspace(0.1, 0.9, COUNT).astype(np.float32)


def packed(rows=ROWS, **changes):
    return pack_rows(rows, TASK.dit, **{"tokens_per_row": S, "clips_per_row": G} | changes)


def arrays_of(task, rows=ROWS):
    return task.arrays({"rows": rows, "tokens_per_row": S, "clips_per_row": G})


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: TASK.build(nnx.Rngs(0)))


def times_of_places():
    times = np.zeros((len(ROWS), G), np.float32)
    times[tuple(zip(*PLACES, strict=True))] = TIMES
    return jnp.asarray(times)


def tokens_of(rows, **fields):
    return Tokens(*map(jnp.asarray, (rows.patches, rows.positions, rows.clip_ids)), **fields)


def text_of(model, rows):
    """Streams of the captions of rows."""
    tokens, mask = (jnp.asarray(rows.conditions[name]).reshape(-1, 17) for name in ("tokens", "mask"))
    return {TEXT: packed_stream(model.encode_text(tokens, mask), G)}


@pytest.fixture(scope="module")
def noise():
    """For the rows, and of it what falls on each clip, as latents of one."""
    rows = packed()
    noise = np.random.default_rng(9).normal(size=rows.patches.shape).astype(np.float32)
    alone = []
    for (r, g), one in zip(PLACES, CLIPS, strict=True):
        tokens = noise[r][rows.clip_ids[r] == g + 1]
        alone.append(back(tokens, one["latents"].shape))
    return noise, alone


def back(tokens, shape):
    """The latents whose patches these are, one by one."""
    t, h, w, c = shape
    latents = np.zeros(shape, np.float32)
    for token, (f, y, x) in zip(tokens, grid_positions(t, h // 2, w // 2), strict=True):
        latents[f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = token.reshape(2, 2, c)
    return latents


def loss_of_rows(model, patches, noise, tokenwise=False):
    """With `tokenwise`, a timestep, and what is made of it, for each token."""
    rows = arrays_of(TASK)
    streams, tokens, outputs = text_of(model, rows), tokens_of(rows._replace(patches=patches)), []

    def network(x, t):
        if tokenwise:
            t = jnp.take_along_axis(jnp.pad(t, ((0, 0), (1, 0))), rows.clip_ids, axis=1)
            x = x._replace(time_ids=jnp.tile(jnp.arange(S), (len(ROWS), 1)))
        outputs.append(model.dit(x, t, streams)[0])
        return outputs[0]

    losses, there = velocity_loss(network, tokens, noise, times_of_places())
    return losses.sum() / there.sum(), (losses, there, outputs[0])


@pytest.fixture(scope="module")
def of_rows(model):
    """Loss, gradients and what else `loss_of_rows` gives, for the noise of the rows."""
    return functools.partial(compiled(model, loss_of_rows), nnx.state(model, graph=False))


def compiled(model, loss):
    graphdef, _ = nnx.split(model, graph=False)
    function = lambda state, *arrays: loss(nnx.merge(graphdef, state), *arrays)  # noqa: E731
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def loss_alone(model, latents, noise, time, tokens, mask):
    streams, outputs = {TEXT: model.encode_text(tokens[None], mask[None])}, []

    def network(x, t):
        outputs.append(model.dit(x, t, streams)[0])
        return outputs[0]

    clip, patch = grid_tokens(TASK.dit, latents[None]), TASK.dit.patch_size
    losses, _ = velocity_loss(network, clip, patchify(noise[None], patch), time[None, None])
    return losses[0, 0], outputs[0][0]


def test_rows_hold_the_patches_positions_and_captions_of_their_clips():
    rows, arrays = packed(), arrays_of(TASK)
    assert rows.patches.shape == (3, S, 16) and arrays.conditions["tokens"].shape == (3, G, 17)
    for (r, g), one in zip(PLACES, CLIPS, strict=True):
        mine = rows.clip_ids[r] == g + 1
        t, h, w, _ = one["latents"].shape
        np.testing.assert_array_equal(
            rows.patches[r][mine], patchify(jnp.asarray(one["latents"])[None], (1, 2, 2))[0]
        )
        np.testing.assert_array_equal(rows.positions[r][mine], grid_positions(t, h // 2, w // 2))
        written = arrays.conditions["tokens"][r, g][arrays.conditions["mask"][r, g]][:-1]
        assert bytes(written.tolist()).decode() == one["caption"] == rows.captions[r][g]
    assert (rows.clip_ids[0] > 0).all() and (rows.clip_ids[1, 12:] == 0).all()
    assert not rows.patches[rows.clip_ids == 0].any()
    assert rows.captions[1][1:] == ["", ""]


@pytest.mark.parametrize("patch", [(2, 1, 2), (1, 2, 1)])
def test_patches_of_any_shape_are_in_the_order_of_the_transformer(patch):
    config = dataclasses.replace(TASK.dit, patch_size=patch)
    latents = np.random.default_rng(0).normal(size=(4, 6, 2, 4)).astype(np.float32)
    made, grid = host_patches(latents, config)
    assert grid == config.token_grid(4, 6, 2)
    np.testing.assert_array_equal(made, patchify(jnp.asarray(latents)[None], patch)[0])


def test_outputs_losses_and_gradients_are_those_of_each_clip_alone(model, of_rows, noise):
    state = nnx.state(model, graph=False)
    (loss, (losses, there, outputs)), grads = of_rows(packed().patches, noise[0])
    alone, clip_ids = compiled(model, loss_alone), packed().clip_ids
    np.testing.assert_array_equal(there, [[True] * 3, [True, False, False], [True, True, False]])
    texts = zip(*tokenize([one["caption"] for one in CLIPS], TASK.text.max_bytes), strict=True)
    expected_losses, expected_grads = [], []
    for (r, g), one, its_noise, time, text in zip(PLACES, CLIPS, noise[1], TIMES, texts, strict=True):
        (value, output), grad = alone(state, one["latents"], its_noise, time, *text)
        np.testing.assert_allclose(losses[r, g], value, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(outputs[r])[clip_ids[r] == g + 1], output, atol=1e-5)
        expected_losses.append(value)
        expected_grads.append(grad)
    assert np.ptp(expected_losses) > 0.1  # a clip's loss is its own
    np.testing.assert_allclose(loss, np.mean(expected_losses), rtol=1e-5)
    expected = jax.tree.map(lambda *leaves: sum(leaves) / COUNT, *expected_grads)
    for (name, want), got in zip(named_leaves(expected).items(), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0.1


def test_what_is_made_of_a_timestep_is_made_once_for_each_clip(model, of_rows, noise):
    """With the numbers of a timestep per token, to rounding, and none of the arrays."""
    arguments = nnx.state(model, graph=False), packed().patches, noise[0]
    of_tokens = compiled(model, functools.partial(loss_of_rows, tokenwise=True))
    (loss, (losses, *_)), grads = of_rows(*arguments[1:])
    (wanted, (wanted_losses, *_)), wanted_grads = of_tokens(*arguments)
    np.testing.assert_allclose(loss, wanted, rtol=5e-7)
    np.testing.assert_allclose(losses, wanted_losses, rtol=5e-7)
    for (name, one), two in zip(named_leaves(grads).items(), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6, err_msg=name)
    wide = 6 * len(ROWS) * S * TASK.dit.model_dim
    largest = [
        max(np.prod(shape) for shape in array_shapes(jax.make_jaxpr(function)(*arguments)) if S in shape)
        for function in (compiled(model, loss_of_rows), of_tokens)
    ]
    assert largest[0] < wide <= largest[1]


def test_padding_is_never_seen(of_rows, noise):
    """Whatever lies in the padding, nothing else changes."""
    rows = packed()
    padding = (rows.clip_ids == 0)[..., None]
    given = of_rows(rows.patches, noise[0])
    changed = of_rows(*(np.where(padding, 9.0, x).astype(np.float32) for x in (rows.patches, noise[0])))
    (loss, (losses, _, outputs)), grads = given
    (loss2, (losses2, _, outputs2)), grads2 = changed
    assert loss == loss2
    jax.tree.map(np.testing.assert_array_equal, (losses, grads), (losses2, grads2))
    same = np.asarray(outputs == outputs2).all(-1)
    np.testing.assert_array_equal(same, ~padding[..., 0])  # it was really changed


def test_the_task_takes_the_mean_over_clips_with_a_timestep_for_each_draw(model):
    task = dataclasses.replace(TASK, draws_per_clip=2)

    @jax.jit
    def loss_of_task(model, batch):
        return task.loss(Context(model=model, batch=batch, key=jax.random.key(2)))

    @jax.jit
    def expected(model, batch):
        key, shape = jax.random.key(2), batch.patches.shape
        noise = jax.random.normal(rng.stream(key, "noise"), shape)
        times = TASK.density.sample(rng.stream(key, "timestep"), len(batch.patches) * G, 1)
        streams, tokens = text_of(model, batch), tokens_of(batch)
        losses, _ = velocity_loss(
            lambda x, t: model.dit(x, t, streams)[0], tokens, noise, times.reshape(-1, G)
        )
        return losses.sum() / (2 * COUNT)

    arrays = arrays_of(task)
    loss, metrics = loss_of_task(model, arrays)
    repeated = jax.tree.map(lambda array: np.repeat(array, 2, axis=0), arrays)
    np.testing.assert_allclose(loss, expected(model, repeated), rtol=1e-5)
    np.testing.assert_allclose(metrics["fill"], (24 + 12 + 12) / (3 * S), rtol=1e-6)
    assert metrics["clips"].value == COUNT
    values = np.concatenate([one["latents"].ravel() for one in CLIPS])
    np.testing.assert_allclose(metrics["latent_std"], values.std(), rtol=1e-5)


def test_rows_and_tokens_are_cut_over_a_mesh(model, noise):
    """Rows over `data`, tokens over `context`, weights over `fsdp` and `tensor`."""
    rows = arrays_of(TASK, ROWS + ROWS[:1])
    times = np.linspace(0.1, 0.9, 4 * G, dtype=np.float32).reshape(4, G)

    @jax.jit
    def losses(model, rows, noise):
        streams, tokens = text_of(model, rows), tokens_of(rows)
        return velocity_loss(lambda x, t: model.dit(x, t, streams)[0], tokens, noise, jnp.asarray(times))[0]

    noise = np.concatenate([noise[0], noise[0][:1]])
    expected = losses(model, rows, noise)
    mesh = MeshOptions(data=2, fsdp=1, context=2, tensor=2).build()
    with jax.set_mesh(mesh):
        cut = processes.global_batch((rows, noise), mesh)
        spread = jax.device_put(model, shardings(model, mesh))
        found = losses(spread, *cut)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_captions_are_dropped_clip_by_clip(model, monkeypatch):
    """Of each clip all words are kept, or none."""
    rows, seen = arrays_of(TASK, ROWS * 8), []
    encode = type(model).encode_text
    recorded = lambda model, *inputs: seen.append(inputs) or encode(model, *inputs)  # noqa: E731
    monkeypatch.setattr(type(model), "encode_text", recorded)
    clips = TrainingClips(tokens_of(rows), G, jax.tree.map(jnp.asarray, rows.conditions), model)
    ByteCaptions(config=TASK.text, dropout=0.5).observe(clips, jax.random.key(0))
    ((tokens, mask),) = seen
    given, words = (
        rows.conditions["tokens"].reshape(-1, 17),
        rows.conditions["mask"].reshape(-1, 17).sum(-1) > 1,
    )
    empty = np.asarray(mask).sum(-1) == 1
    assert 0.3 < empty[words].mean() < 0.7
    np.testing.assert_array_equal(np.asarray(tokens)[~empty], given[~empty])


def test_with_a_known_first_frame_the_loss_is_that_of_the_other_frames(model):
    """Clips of one frame, of which nothing would be left, are predicted."""
    task = dataclasses.replace(TASK, conditioners=(FirstFrame(probability=1.0),))
    rows, key = arrays_of(task), jax.random.key(2)
    times = TASK.density.sample(rng.stream(key, "timestep"), len(ROWS) * G, 1).reshape(-1, G)
    noise = jax.random.normal(rng.stream(key, "noise"), rows.patches.shape)
    known_mask = np.zeros(rows.clip_ids.shape, bool)
    for (r, g), one in zip(PLACES, CLIPS, strict=True):
        if len(one["latents"]) > 1:
            known_mask[r] |= (rows.clip_ids[r] == g + 1) & (rows.positions[r, :, 0] == 0)

    @jax.jit
    def both(model, rows):
        tokens = tokens_of(rows, known_mask=jnp.asarray(known_mask))
        found, _ = model.dit(interpolate(tokens, noise, times), times, text_of(model, rows))
        return found, task.loss(Context(model=model, batch=rows, key=key))[0]

    found, loss = both(model, rows)
    errors = np.square(np.asarray(found) - (np.asarray(noise) - rows.patches)).mean(-1)
    expected = [errors[r][(rows.clip_ids[r] == g + 1) & ~known_mask[r]].mean() for r, g in PLACES]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def features_of(_, captions):
    """What a text encoder makes of captions: numbers of their own for each, zeros beyond it."""
    features = np.zeros((len(captions), 9, 32), np.float32)
    for row, caption in zip(features, captions, strict=True):
        length = 1 + len(caption) % 8
        row[:length] = np.random.default_rng(len(caption)).normal(size=(length, 32))
    return features


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_features_of_a_text_encoder_are_those_of_each_clip_alone(monkeypatch, dropout):
    monkeypatch.setattr(TextFeatures, "features", features_of)
    task = dataclasses.replace(TASK, text_encoder=TextFeatures(path="unused"), caption_dropout=dropout)
    model = random_module(lambda: task.build(nnx.Rngs(0)))
    arrays = arrays_of(task)
    assert arrays.conditions["text"].shape == (3, G, 9, 32) and arrays.conditions["empty_text"].shape == (
        3,
        1,
        9,
        32,
    )

    (captions,) = task.all_conditioners

    @jax.jit
    def of_rows(model, arrays):
        tokens = tokens_of(arrays)
        condition = captions.observe(TrainingClips(tokens, G, arrays.conditions, model), jax.random.key(0))
        return model.dit(tokens, times_of_places(), condition.streams)[0]

    alone = jax.jit(lambda model, *inputs: velocity(model.dit, *inputs))
    found = of_rows(model, arrays)
    for (r, g), one, time in zip(PLACES, CLIPS, TIMES, strict=True):
        text = features_of(None, ["" if dropout else one["caption"]])
        expected = alone(model, one["latents"][None], time[None], text)[0]
        mine = np.asarray(found[r])[arrays.clip_ids[r] == g + 1]
        np.testing.assert_allclose(back(mine, one["latents"].shape), expected, atol=1e-5)
    loss = jax.jit(lambda *args: task.loss(Context(model=args[0], batch=args[1], key=jax.random.key(1)))[0])
    assert np.isfinite(loss(model, arrays))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([[CLIPS[1], CLIPS[1], CLIPS[0]]], {}, r"row 0 is full before clip-0 \(4 tokens\): it holds 3 clips"),
        ([[CLIPS[0]] * 2], {"clips_per_row": 1}, "full before clip-0"),
        ([[clip(7, (1, 3, 4))]], {}, r"clip-7: latents of .* do not divide into patches"),
        (
            [[{**CLIPS[0], "latents": np.zeros((1, 4, 4, 5), np.float32)}]],
            {},
            "clip-0: latents have 5 channels",
        ),
    ],
)
def test_what_does_not_fit_is_named(rows, changes, message):
    with pytest.raises(ValueError, match=message):
        packed(rows, **changes)
