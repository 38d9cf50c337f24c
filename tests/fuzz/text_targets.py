"""Captions, prompts and tokenizers."""

import json
import pathlib

import numpy as np
import tokenizers
from PIL import Image

from tests.fuzz.mutate import damage_bytes, damage_json, damage_lines
from tests.fuzz.target import Target
from tests.models.tiny_tokenizer import write_tokenizer
from vidgen.cli import sample
from vidgen.data.folder import FolderData
from vidgen.models.t5.tokenizer import PromptTokenizer

CAPTIONS = ("A red circle moves left.", '"été", 雨 and\ttabs', "two, with commas; and 'quotes'")
NAMES = ("a.png", "b.png", "sub/c.png")


def _make_images(folder: pathlib.Path) -> None:
    (folder / "sub").mkdir()
    for value, name in enumerate(NAMES):
        Image.fromarray(np.full((4, 6, 3), 80 * value, np.uint8)).save(folder / name)


def _make_txt(folder: pathlib.Path) -> None:
    _make_images(folder)
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def _make_jsonl(folder: pathlib.Path) -> None:
    _make_images(folder)
    rows = [{"file": n, "caption": c, "n": 1} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _make_csv(folder: pathlib.Path) -> None:
    _make_images(folder)
    rows = [f'{n},"{c.replace(chr(34), chr(34) * 2)}"' for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows, ""]), encoding="utf-8")


def _read_captions(folder: pathlib.Path) -> None:
    report = FolderData(path=str(folder), num_frames=1, height=4, width=4).scan()
    for file in report.used:
        # What is taken for a caption can be written to a file, and is one line.
        assert file.caption.encode("utf-8").decode() == file.caption and "\n" not in file.caption


def _make_prompts(folder: pathlib.Path) -> None:
    (folder / "prompts.txt").write_text("\n".join([*CAPTIONS, "", " x "]), encoding="utf-8")


def _read_prompts(folder: pathlib.Path) -> None:
    """Up to the checkpoint, which is named when the prompts are good."""
    prompts = f"--prompt-file={folder / 'prompts.txt'}"
    try:
        sample.main(["--checkpoint", str(folder / "gone"), prompts, "--out", str(folder / "a.mp4")])
    except FileNotFoundError as error:
        if "gone" not in str(error):
            raise


def _make_fast(folder: pathlib.Path) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0), ("▁a", -2.5)]
    pieces += [(letter, -3.0 - index / 10) for index, letter in enumerate("abcdefghilmnorstuvw")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"pad_token": {"content": "<pad>"}, "eos_token": "</s>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def _read_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = PromptTokenizer(folder, max_tokens=16)
    tokens, mask = tokenizer(["", "a red circle", "雨 " * 40])
    assert tokens.shape == mask.shape == (3, 16)


TARGETS = {
    "captions_txt": Target(make=_make_txt, damaged={"**/*.txt": damage_lines}, read=_read_captions),
    "captions_jsonl": Target(make=_make_jsonl, damaged={"*.jsonl": damage_lines}, read=_read_captions),
    "captions_csv": Target(make=_make_csv, damaged={"*.csv": damage_lines}, read=_read_captions),
    "prompts": Target(make=_make_prompts, damaged={"*.txt": damage_lines}, read=_read_prompts),
    "tokenizer_json": Target(make=_make_fast, damaged={"*.json": damage_json}, read=_read_tokenizer),
    "spiece": Target(make=write_tokenizer, damaged={"*.model": damage_bytes}, read=_read_tokenizer),
}
