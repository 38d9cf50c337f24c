"""Tokens equal those of transformers' tokenizer, from either kind of file."""

import json
import logging

import numpy as np
import pytest

from tests.models.tiny_tokenizer import write_tokenizer
from vidgen.models.t5.tokenizer import PromptTokenizer, clean_prompt

PROMPTS = ["a red circle moves left.", "", "Zürich  at\ndawn", "unknown: ψ ☂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    return transformers.T5Tokenizer.from_pretrained(folder)


@pytest.fixture(params=["spiece.model", "tokenizer.json"])
def tokenizer_folder(request, folder, reference, tmp_path):
    if request.param == "spiece.model":
        return folder
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "spiece.model").exists()
    return tmp_path


def test_tokens_are_those_of_transformers(tokenizer_folder, reference):
    tokens, mask = PromptTokenizer(tokenizer_folder, max_tokens=40)(PROMPTS)
    expected = reference([clean_prompt(p) for p in PROMPTS], padding="max_length", max_length=40)
    np.testing.assert_array_equal(tokens, expected.input_ids)
    np.testing.assert_array_equal(mask, np.array(expected.attention_mask, bool))
    assert mask[1].sum() == 1, "the end mark"


def test_long_prompts_are_cut_with_a_warning_that_shows_what_is_lost(tokenizer_folder, reference, caplog):
    prompt = "A red circle moves to the left on a green field"
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        tokens, mask = PromptTokenizer(tokenizer_folder, max_tokens=6)([prompt])
    expected = reference([prompt], max_length=6, truncation=True)
    np.testing.assert_array_equal(tokens, expected.input_ids)
    assert mask.all()
    kept = reference.decode(expected.input_ids[0], skip_special_tokens=True)
    assert prompt.startswith(kept)
    count = len(reference(prompt).input_ids)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"has {count} tokens, the text encoder takes 6" in message
    lost = message.split("cut off: ")[1].strip("'")
    assert prompt.endswith(lost) and (kept + lost).replace(" ", "") == prompt.replace(" ", "")


def test_prompts_are_cleaned():
    assert clean_prompt("  a &amp;amp; b\n\t c ") == "a & b c"
    assert clean_prompt("ZÃ¼rich") == "Zürich"


def test_cleaning_is_that_of_diffusers():
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan", reason="needs the extra `parity`")
    for prompt in ["  a &amp;amp; b\n\t c ", "&lt;b&gt;", "ZÃ¼rich", *PROMPTS]:
        assert clean_prompt(prompt) == wan.prompt_clean(prompt)


def test_folders_and_files_that_are_no_tokenizer(folder, reference, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor spiece\.model"):
        PromptTokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"spiece\.model is no SentencePiece model"):
        PromptTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer .*download it again"):
        PromptTokenizer(tmp_path)
    reference.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**options, "pad_token": "<blank>"}))
    with pytest.raises(ValueError, match=r"has no token '<blank>' for padding"):
        PromptTokenizer(tmp_path)
