"""Damaged files of weights, many and quickly: read in this process, without the watch of `runner`."""

import json
import random

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.fuzz import mutate
from tests.models.tiny_tokenizer import write_tokenizer
from vidgen.ckpt.tensor_files import TensorFiles
from vidgen.core.errors import UserError
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.diffusers_folder import read_config
from vidgen.models.dit.lora_tensors import read_tensors
from vidgen.models.dit.model import DiT
from vidgen.models.t5.tokenizer import PromptTokenizer

COUNTS = [pytest.param(60, id="few"), pytest.param(1000, id="many", marks=pytest.mark.slow)]
CONFIG = DiTConfig(
    in_channels=4, model_dim=24, num_layers=2, num_heads=2, ffn_dim=20, text_dim=10, freq_dim=16
)


def survives(path, damage, original, read, count):
    ends = {"read": 0, "refused": 0}
    for index in range(count):
        path.write_bytes(damage(original, random.Random(f"{path.name}/{index}"), original))
        try:
            read()
            ends["read"] += 1
        except UserError as error:
            if path.name not in str(error):
                pytest.fail(f"the error does not name the file: {error}")
            ends["refused"] += 1
    assert ends["refused"] > count // 10, ends


@pytest.fixture(scope="module")
def lora():
    rng = np.random.default_rng(0)
    tensors = {
        f"transformer.blocks.{layer}.attn1.to_q.{side}.weight": rng.normal(size=shape).astype(np.float32)
        for layer in (0, 1)
        for side, shape in (("lora_A", (3, 24)), ("lora_B", (24, 3)))
    }
    return nnx.eval_shape(lambda: DiT(CONFIG, rngs=nnx.Rngs(0))), tensors


@pytest.mark.parametrize("count", COUNTS)
def test_lora_files(count, lora, tmp_path):
    dit, tensors = lora
    path = tmp_path / "a.safetensors"
    said = json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6})
    save_file(tensors, path, metadata={"lora_adapter_metadata": said})

    def read():
        found = read_tensors(TensorFiles(path), dit, path)
        for pair in found.pairs.values():
            assert all(np.isfinite(factor).all() for factor in pair.read())

    read()
    survives(path, mutate.damage_safetensors, path.read_bytes(), read, count)


@pytest.mark.parametrize("count", COUNTS)
def test_configs(count, tmp_path):
    path = tmp_path / "config.json"
    values = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 10,
        "freq_dim": 16,
        "ffn_dim": 20,
        "num_layers": 2,
        "eps": 1e-6,
    }
    survives(path, mutate.damage_json, json.dumps(values).encode(), lambda: read_config(tmp_path), count)


@pytest.mark.parametrize("count", COUNTS)
def test_indexes(count, tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "w-1.safetensors")
    path = tmp_path / "w.safetensors.index.json"

    def read():
        try:
            TensorFiles(tmp_path / "w.safetensors")
        except FileNotFoundError as error:
            raise UserError(f"{path.name}: {error}") from error
        except UserError as error:  # An index that asks for more than a file has names that file first.
            raise UserError(f"{path.name}: {error}") from error

    survives(
        path, mutate.damage_json, json.dumps({"weight_map": {"a": "w-1.safetensors"}}).encode(), read, count
    )


@pytest.mark.parametrize("count", COUNTS)
def test_tokenizers(count, tmp_path):
    path = write_tokenizer(tmp_path) / "spiece.model"

    def read():
        PromptTokenizer(tmp_path, max_tokens=16)(["A red circle", "\0 雨 \ud7ff"])

    read()
    survives(path, mutate.damage_bytes, path.read_bytes(), read, count)


@pytest.mark.parametrize("count", COUNTS)
def test_fast_tokenizers(count, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(FAST))

    def read():
        PromptTokenizer(tmp_path, max_tokens=16)(["a red circle", "x"])

    read()
    survives(path, mutate.damage_json, path.read_bytes(), read, count)


FAST = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4},
        "unk_token": "<unk>",
    },
}
