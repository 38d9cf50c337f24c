"""Features of prompts: zeros beyond them, and kept on disk."""

import functools
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.core.errors import UserError
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.prompts import FeatureCache, T5Prompts, digest
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions

CONFIG = T5Config(vocab_size=40, dim=16, num_layers=1, num_heads=2, head_dim=8, ffn_dim=24)


class Letters(PromptTokenizer):
    """A tokenizer of the letters a to z, with 0 for padding and 1 for the end."""

    def __init__(self):
        self.max_tokens = 12

    def __call__(self, prompts):
        ids = [[ord(letter) - 95 for letter in prompt] + [1] for prompt in prompts]
        tokens = np.array([row + [0] * (12 - len(row)) for row in ids], np.int32)
        return tokens, np.arange(12)[None] < np.array([len(row) for row in ids])[:, None]


@pytest.fixture(scope="module")
def encoder():
    return random_module(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def make(encoder):
    return functools.partial(T5Prompts, lambda: encoder, Letters())


def forbidden():
    raise AssertionError("the encoder is not needed")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_are_those_of_the_encoder_and_zeros_beyond_the_prompt(make, encoder, count):
    prompts = ["abc", "", "defghij", "z", "abcdefghijk"][:count]
    stream = make(batch_size=3)(prompts)
    assert stream.mask is None and stream.features.shape == (count, 12, 16)
    for row, prompt in zip(np.asarray(stream.features), prompts, strict=True):
        tokens, mask = map(jnp.asarray, Letters()([prompt]))
        used = len(prompt) + 1
        np.testing.assert_allclose(row[:used], encoder(tokens, mask)[0, :used], rtol=1e-5, atol=1e-5)
        assert used == 12 or (row[used:] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_was_encoded_once_needs_no_encoder(encoder, tmp_path, dtype):
    cache = FeatureCache(tmp_path, "one")
    prompts = T5Prompts(lambda: encoder, Letters(), cache=cache)
    prompts._encode = lambda tokens, mask: np.asarray(
        encoder(jnp.asarray(tokens), jnp.asarray(mask)).astype(dtype)
    )
    first = prompts.features(["abc", "de", "abc"])
    assert first.dtype == dtype
    again = T5Prompts(forbidden, Letters(), cache=cache).features(["de", "abc"])
    np.testing.assert_array_equal(again, first[[1, 0]])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    with pytest.raises(AssertionError, match="not needed"):
        T5Prompts(forbidden, Letters(), cache=FeatureCache(tmp_path, "another")).features(["de"])


def test_no_prompt_is_an_error(make):
    with pytest.raises(UserError, match="no prompt to encode"):
        make().features([])


def test_a_damaged_file_is_encoded_again(make, tmp_path, caplog):
    prompts = make(cache=FeatureCache(tmp_path, "one"))
    first = prompts.features(["abc"])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        np.testing.assert_array_equal(prompts.features(["abc"]), first)
    assert "is damaged" in caplog.text
    caplog.clear()
    prompts.features(["abc"])
    assert caplog.text == ""


def test_what_one_process_lacks_is_encoded_by_all(make, tmp_path, monkeypatch):
    """They encode together, whatever each of them finds."""
    here = FeatureCache(tmp_path, "here")
    first = make(cache=here).features(["abc", "de"])
    prompts = make(cache=here, mesh=MeshOptions().build())
    asked, encoded = [], []
    monkeypatch.setattr(processes, "is_shared", lambda mesh: True)
    there = np.array([True, True, False, True])  # Of another process, which knows "de" alone.
    monkeypatch.setattr(processes, "anywhere", lambda flags: asked.append(flags.tolist()) or (flags | there))
    encode = prompts._encode
    monkeypatch.setattr(prompts, "_encode", lambda *x: encoded.append(len(x[0])) or encode(*x))
    features = prompts.features(["abc", "z", "de", "abc"])
    assert asked == [[False, True, False, False]] and encoded == [2]
    np.testing.assert_allclose(features[[0, 2]], first, rtol=1e-5, atol=1e-5)


def test_the_digest_sees_names_sizes_and_contents(tmp_path):
    small, large = tmp_path / "a", tmp_path / "b"
    small.write_bytes(b"1")
    large.write_bytes(bytes(300_000))
    seen = {digest([small, large]), digest([small, large], "bfloat16"), digest([small])}
    small.write_bytes(b"2")
    seen.add(digest([small, large]))
    large.write_bytes(bytes(299_999) + b"1")
    seen.add(digest([large, small]))
    assert len(seen) == 5
    assert digest([large, small]) == digest([small, large])
