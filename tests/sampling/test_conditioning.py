"""Conditioners: what each makes of clips in training and of a request in sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.tiny_pipeline import DIT, SIZE, VAE, make_model, make_vae
from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.streams import CONCAT_LATENTS, TEXT, Stream
from vidgen.core.tokens import Tokens, patchify
from vidgen.nn.embeddings import grid_positions
from vidgen.parallel.mesh import MeshOptions
from vidgen.sampling.conditioners import ConcatFrames, FirstFrame, Prompts
from vidgen.sampling.conditioning import (
    Condition,
    Target,
    TrainingClips,
    TrainingConditioner,
    check_conditioners,
    merged,
)
from vidgen.sampling.request import Request

CONCAT = dataclasses.replace(DIT, in_channels=4 + 2 + 4, out_channels=4)
PICTURES = np.random.default_rng(0).integers(0, 256, (2, *SIZE[1:], 3), np.uint8)


@pytest.fixture(scope="module")
def target():
    mesh = MeshOptions(data=1).build(jax.devices()[:1])
    return Target(make_model(CONCAT), make_vae(), SIZE, 2, mesh)


def observed(tokens, clips, probability=1.0, seed=0):
    conditioner = FirstFrame(probability=probability)
    condition = conditioner.observe(TrainingClips(tokens, clips, {}, model=None), jax.random.key(seed))
    assert condition.streams == {} and condition.known_patches is tokens.patches
    return np.asarray(condition.known_mask)


def test_the_first_frame_is_known_in_packed_clips_as_in_each_alone():
    """Eight clips of two latent frames of 4 tokens."""
    patches = jnp.arange(8.0 * 8 * 16).reshape(8, 8, 16)
    positions = grid_positions(2, 2, 2)[None]
    alone = observed(Tokens(patches, positions), 1, 0.5)
    assert 0 < alone[:, 0].sum() < 8 and not alone[:, 4:].any()
    np.testing.assert_array_equal(alone[:, :4], alone[:, :1].repeat(4, axis=1))
    packed = Tokens(
        patches.reshape(4, 16, 16),
        jnp.tile(jnp.asarray(positions), (4, 2, 1)),
        jnp.tile(jnp.repeat(jnp.arange(1, 3), 8), (4, 1)),
    )
    np.testing.assert_array_equal(observed(packed, 2, 0.5).reshape(8, 8), alone)


def test_images_and_padding_are_never_known():
    image, video = grid_positions(1, 2, 2), grid_positions(2, 2, 2)
    assert not observed(Tokens(jnp.zeros((3, 4, 16)), image[None]), 1).any()
    positions = jnp.asarray(np.concatenate([image, video, np.zeros((3, 3), np.int32)]))[None]
    clip_ids = jnp.asarray([[1] * 4 + [2] * 8 + [0] * 3])
    known = observed(Tokens(jnp.zeros((1, 15, 16)), positions, clip_ids), 3)
    assert np.flatnonzero(known[0]).tolist() == [4, 5, 6, 7]


def test_a_request_has_the_latents_of_its_image_as_first_frame(target):
    assert isinstance(FirstFrame(), TrainingConditioner)
    assert FirstFrame().from_request(Request(prompt="a"), target) == Condition()
    made = FirstFrame().from_request(Request(prompt="a", image=PICTURES[0]), target)
    frame = patchify(target.vae.encode(pixels.to_float(jnp.asarray(PICTURES[:1])[None])), (1, 2, 2))
    np.testing.assert_array_equal(made.known_mask, [[True] * 4 + [False] * 4] * 2)
    np.testing.assert_allclose(made.known_patches[:, :4], jnp.tile(frame, (2, 1, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [None, PICTURES[1]], ids=["first", "first and last"])
def test_channels_of_known_frames_are_a_mask_and_their_latents(target, last):
    request = Request(prompt="a", image=PICTURES[0], last_image=last)
    (stream,) = ConcatFrames().from_request(request, target).streams.values()
    pictures = pixels.to_float(jnp.asarray(PICTURES)[:, None])
    video = jnp.zeros((1, *SIZE, 3)).at[:, :1].set(pictures[:1])
    if last is not None:
        video = video.at[:, -1:].set(pictures[1:])
    # Channels: of the mask, one for each frame of a latent frame; then of the latents.
    shown = np.asarray(stream.features).reshape(2, 2, 4, 4, 6)
    np.testing.assert_array_equal(shown[:, 0, ..., :2], 1.0)
    np.testing.assert_array_equal(shown[:, 1, ..., :2], np.broadcast_to([0, last is not None], (2, 4, 4, 2)))
    latents = patchify(target.vae.encode(video), (1, 2, 2)).reshape(2, 4, 4, 4)
    np.testing.assert_allclose(shown[..., 2:], np.stack([latents] * 2), rtol=1e-4, atol=1e-5)


def test_channels_in_training_are_those_of_a_request(target):
    assert isinstance(ConcatFrames(), TrainingConditioner)
    video = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), np.uint8))
    clips = TrainingClips(Tokens(jnp.zeros((2, 8, 16)), grid_positions(2, 2, 2)[None]), 1, {}, target.model)
    clips = clips._replace(vae=target.vae, video=pixels.to_float(video))
    observed = ConcatFrames().observe(clips, jax.random.key(0)).streams[CONCAT_LATENTS].features
    for one, frame in zip(observed, np.asarray(video[:, 0]), strict=True):
        request = Request(prompt="a", image=frame)
        made = ConcatFrames().from_request(request, target).streams[CONCAT_LATENTS].features
        np.testing.assert_allclose(one, made[0], rtol=1e-4, atol=1e-5)


def test_a_model_of_images_needs_one(target):
    with pytest.raises(UserError, match="image is missing: the model generates videos from a first frame"):
        ConcatFrames().from_request(Request(prompt="a"), target)
    with pytest.raises(FileNotFoundError, match=r"none\.png: there is no such image"):
        FirstFrame().from_request(Request(prompt="a", image="none.png"), target)


@dataclasses.dataclass(frozen=True)
class Boxes:
    fields = frozenset()
    provides = frozenset({"boxes"})

    def check(self, dit, vae): ...

    def from_request(self, request, target): ...


PROMPTS = Prompts(encode=lambda prompts: Stream(jnp.zeros((len(prompts), 1, 16))))


@pytest.mark.parametrize(
    ("conditioners", "dit", "message"),
    [
        ((), DIT, r"dit\.text_dim: the transformer takes the stream 'text', which no conditioner makes"),
        ((PROMPTS, PROMPTS), DIT, "both make the stream 'text'"),
        (
            (PROMPTS, Boxes()),
            DIT,
            r"Boxes\(\) makes the stream 'boxes', and the transformer takes text: remove",
        ),
        ((PROMPTS,), CONCAT, r"dit\.in_channels: the transformer takes the stream 'concat_latents'"),
        (
            (PROMPTS, ConcatFrames()),
            DIT,
            r"dit\.in_channels=4: concat_frames makes 6 channels; set in_channels=10 and out_channels=4",
        ),
        (
            (PROMPTS, FirstFrame()),
            dataclasses.replace(DIT, patch_size=(2, 2, 2)),
            r"first_frame: a patch of dit\.patch_size=\(2, 2, 2\) is more than one latent frame",
        ),
    ],
)
def test_conditioners_must_fit_the_transformer(conditioners, dit, message):
    with pytest.raises(UserError, match=message):
        check_conditioners(conditioners, dit, VAE)


def test_conditioners_that_fit_and_their_union():
    check_conditioners((PROMPTS, FirstFrame()), DIT, VAE)
    check_conditioners((PROMPTS, ConcatFrames(), FirstFrame()), CONCAT, VAE)
    stream = Stream(jnp.zeros((1, 1, 1)))
    known = Condition(known_patches=jnp.zeros((1, 4, 4)), known_mask=jnp.zeros((1, 4), bool))
    both = merged([Condition({TEXT: stream}, negative={TEXT: stream}), known, Condition({"boxes": stream})])
    assert both.streams.keys() == {TEXT, "boxes"} and both.negative.keys() == {TEXT}
    assert both.known_mask is known.known_mask
    with pytest.raises(UserError, match="two conditioners make tokens known"):
        merged([known, known])
    with pytest.raises(UserError, match="probability"):
        FirstFrame(probability=1.5)
