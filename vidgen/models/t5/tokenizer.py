"""Tokenizer of T5 and UMT5, read from `tokenizer.json` or `spiece.model`."""

import contextlib
import functools
import html
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import ftfy
import numpy as np
import sentencepiece
import tokenizers

from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.core.logging import get_logger
from vidgen.core.typing import Bool, Int

__all__ = ["PromptTokenizer", "clean_prompt"]

_log = get_logger(__name__)

_MAX_BYTES = 64 << 20
"""Largest tokenizer file that is read; UMT5's tokenizer.json has 17 MB."""
_AGAIN = "download it again"

_FAST, _SENTENCEPIECE, _OPTIONS = "tokenizer.json", "spiece.model", "tokenizer_config.json"


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt as Wan does: repairs broken Unicode, unescapes HTML, collapses white space."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired).strip()


class PromptTokenizer:
    """Cleans and tokenizes prompts; each prompt ends with an end mark.

    Attributes:
      max_tokens: longest prompt in tokens, with its end mark. Longer prompts are truncated, with a warning
        that quotes the lost text.
    """

    def __init__(self, folder: pathlib.Path | str, *, max_tokens: int = 512):
        """Reads `tokenizer.json`, or else `spiece.model`.

        Raises:
          FileNotFoundError: `folder` has neither file.
          UserError: the file is damaged, or has no padding token or end mark.
        """
        self.max_tokens = max_tokens
        folder = pathlib.Path(folder)
        if (folder / _FAST).exists():
            self._split, self._pad = _fast(folder)
        elif (folder / _SENTENCEPIECE).exists():
            self._split, self._pad = _sentencepiece(folder / _SENTENCEPIECE)
        else:
            raise FileNotFoundError(
                f"{folder} has neither {_FAST} nor {_SENTENCEPIECE}: give the folder of a tokenizer"
            )

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b {self.max_tokens}"], Bool[np.ndarray, "b {self.max_tokens}"]]:
        """Padded token ids, and a mask that is true for tokens of the prompt."""
        tokens = np.full((len(prompts), self.max_tokens), self._pad, np.int32)
        mask = np.zeros(tokens.shape, np.bool_)
        for row, used, prompt in zip(tokens, mask, prompts, strict=True):
            ids = self._ids(clean_prompt(prompt))
            row[: len(ids)] = ids
            used[: len(ids)] = True
        return tokens, mask

    def _ids(self, prompt: str) -> list[int]:
        ids, starts = self._split(prompt)
        if len(ids) <= self.max_tokens:
            return ids
        lost = prompt[starts[self.max_tokens - 1] :]
        _log.warning(
            "the prompt has %d tokens, the text encoder takes %d; this end was cut off: %r",
            len(ids),
            self.max_tokens,
            lost,
        )
        return [*ids[: self.max_tokens - 1], ids[-1]]


_Split = Callable[[str], tuple[list[int], list[int]]]
"""Maps a text to its token ids, with the end mark, and the character offset where each token begins."""


def _fast(folder: pathlib.Path) -> tuple[_Split, int]:
    path = folder / _FAST
    _check_file(path)
    with _named(path, "no tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        empty = tokenizer.encode("").ids
    options = read_json(folder / _OPTIONS, remedy=_AGAIN) if (folder / _OPTIONS).exists() else {}
    pad_token = options.get("pad_token", "<pad>")
    pad_token = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    if not isinstance(pad_token, str):
        raise UserError(
            f"{folder / _OPTIONS}: pad_token is {str(pad_token)[:60]!r}; expected a token: {_AGAIN}"
        )
    pad = tokenizer.token_to_id(pad_token)
    if pad is None:
        raise UserError(
            f"{path} has no token {pad_token[:60]!r} for padding: expected a tokenizer of T5 or UMT5"
        )
    if len(empty) != 1:
        raise UserError(f"{path} adds {len(empty)} tokens to a text, expected an end mark alone: {_AGAIN}")

    def split(text: str) -> tuple[list[int], list[int]]:
        with _named(path, "no tokenizer"):
            found = tokenizer.encode(text)
        return found.ids, [start for start, _ in found.offsets]

    return split, pad


def _sentencepiece(path: pathlib.Path) -> tuple[_Split, int]:
    _check_file(path)
    with _named(path, "no SentencePiece model"):
        # Read here: given a path, the library blocks on pipes, and takes long to refuse other files.
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        marks = model.pad_id(), model.eos_id()
    if min(marks) < 0:
        raise UserError(f"{path} has no padding token or no end mark: expected a tokenizer of T5 or UMT5")
    return functools.partial(_split_by, model), marks[0]


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is no regular file: {_AGAIN}")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} is larger than {_MAX_BYTES:,} bytes, too large for a tokenizer: {_AGAIN}")


@contextlib.contextmanager
def _named(path: pathlib.Path, what: str) -> Iterator[None]:
    """Turns any library exception, which has no narrow type, and Rust panics into an error with the path."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{path} is {what} ({str(error)[:200]}): {_AGAIN}") from error
        raise


def _split_by(model: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
    pieces = model.encode(text, out_type="proto").pieces
    return [*(piece.id for piece in pieces), model.eos_id()], [*(piece.begin for piece in pieces), len(text)]
