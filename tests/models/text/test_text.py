import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder, hash_ngrams
from vidgen.models.text.tokenizer import END, PADDING, PromptTooLong, tokenize
from vidgen.models.text_to_video import TextToVideo

CONFIG = ByteEncoderConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=24, max_bytes=9)


def test_tokens_are_bytes_an_end_and_padding():
    tokens, mask = tokenize(["né", "", "123456789"], 9)
    assert tokens.dtype == np.int32 and tokens.shape == mask.shape == (3, 10)
    assert tokens[0].tolist() == [110, 0xC3, 0xA9, END, *[PADDING] * 6]
    assert mask.sum(1).tolist() == [4, 1, 10]
    assert tokens[2].tolist() == [*b"123456789", END]


def test_long_prompts_are_errors_that_name_what_would_be_lost():
    with pytest.raises(PromptTooLong, match=r"has 11 bytes, the text encoder takes 9.*'89'"):
        tokenize(["1234567é89"], 9)
    with pytest.raises(PromptTooLong):
        tokenize(["short", "0123456789"], 9)


def test_long_captions_are_cut_between_characters():
    tokens, _ = tokenize(["12345678é"], 9, truncate=True)
    assert tokens[0].tolist() == [*b"12345678", END, PADDING]


@pytest.fixture(scope="module")
def encoder():
    return random_module(lambda: ByteEncoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def encode():
    return jax.jit(lambda encoder, tokens, mask: encoder(tokens, mask))


def test_features_depend_on_every_byte_and_place_but_not_on_padding(encoder, encode):
    tokens, mask = map(jnp.asarray, tokenize(["abc", "abd", "bac", "abc"], 9))
    features = encode(encoder, tokens.at[3, 4:].set(7), mask)
    assert features.shape == (4, 10, 16)
    there = np.asarray(features[:, :4])
    np.testing.assert_array_equal(there[0], there[3])
    assert np.abs(there[0] - there[1]).max(-1).min() > 1e-3, "attention goes in both directions"
    assert np.abs(there[0] - there[2]).max(-1).min() > 1e-3


def test_less_padding_gives_the_same_features(encoder, encode):
    tokens, mask = map(jnp.asarray, tokenize(["abc"], 9))
    short = encode(encoder, tokens[:, :5], mask[:, :5])
    np.testing.assert_allclose(short[:, :4], encode(encoder, tokens, mask)[:, :4], rtol=1e-5, atol=1e-5)


def test_only_the_distance_between_bytes_counts(encoder, encode):
    tokens, mask = map(jnp.asarray, tokenize(["abcd"], 9))
    shifted = encode(encoder, jnp.roll(tokens, 3, axis=1), jnp.roll(mask, 3, axis=1))
    np.testing.assert_allclose(shifted[:, 3:8], encode(encoder, tokens, mask)[:, :5], rtol=1e-4, atol=1e-5)


def test_ngrams_have_one_row_wherever_they_stand_and_spread_evenly():
    tokens, _ = tokenize(["a red cat is red", "fired"], 20)
    rows = hash_ngrams(jnp.asarray(tokens), 3, 4096)
    assert rows[0, 4] == rows[0, 15] == rows[1, 4]
    assert rows[0, 4] != hash_ngrams(jnp.asarray(tokens), 4, 4096)[0, 4]
    every_pair = jnp.stack(jnp.meshgrid(jnp.arange(256), jnp.arange(256)), -1).reshape(-1, 2)
    counts = np.bincount(hash_ngrams(every_pair, 2, 1024)[:, 1], minlength=1024)
    # At random the counts, 64 on average, have a standard deviation of 8.
    assert counts.std() < 12


def test_ngrams_tell_prompts_apart_before_any_training():
    def distance(ngrams):
        config = dataclasses.replace(CONFIG, ngrams=ngrams)
        model = ByteEncoder(config, rngs=nnx.Rngs(0))
        features = model(*map(jnp.asarray, tokenize(["a dog", "a god"], 9)))
        return np.linalg.norm(features[0].mean(0) - features[1].mean(0))

    assert distance((3, 4)) > 1.5 * distance(())
    with pytest.raises(ValueError, match=r"ngrams=\(1,\)"):
        ByteEncoderConfig(ngrams=(1,))


def test_text_and_transformer_must_agree_on_the_width():
    dit = DiTConfig(model_dim=24, num_layers=1, num_heads=2, ffn_dim=32, text_dim=10)
    build = lambda dit: TextToVideo(DiT(dit, rngs=nnx.Rngs(0)), ByteEncoder(CONFIG, rngs=nnx.Rngs(0)))  # noqa: E731
    with pytest.raises(ValueError, match=r"dit\.text_dim=10 differs from text\.dim=16"):
        build(dit)
    fitting = dataclasses.replace(dit, text_dim=16)
    model = nnx.eval_shape(lambda: build(fitting))
    tokens, mask = tokenize(["a", "b"], 9)
    text = nnx.eval_shape(lambda model: model.encode_text(jnp.asarray(tokens), jnp.asarray(mask)), model)
    assert text.features.shape == (2, 10, 16) and text.mask.shape == (2, 10)
