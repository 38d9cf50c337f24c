"""Prompts to the tokens of T5 and UMT5, from the tokenizer's files."""

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
"""UMT5's tokenizer.json has 17 MB."""
_AGAIN = "download it again"

_FAST, _SENTENCEPIECE, _OPTIONS = "tokenizer.json", "spiece.model", "tokenizer_config.json"


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan takes it: broken characters mended, HTML entities resolved, one space between words."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


class PromptTokenizer:
    """Cleans prompts and splits them into tokens; each ends in an end mark.

    Attributes:
      max_tokens: of a prompt, with its end mark. What is beyond is cut off, with a warning that shows it.
    """

    def __init__(self, folder: pathlib.Path | str, *, max_tokens: int = 512):
        """Reads `tokenizer.json`, or else `spiece.model`.

        Raises:
          FileNotFoundError: neither is in `folder`.
          UserError: the file is damaged, or has no padding or end mark.
        """
        self.max_tokens = max_tokens
        folder = pathlib.Path(folder)
        if (folder / _FAST).exists():
            self._split, self._pad = _fast(folder)
        elif (folder / _SENTENCEPIECE).exists():
            self._split, self._pad = _sentencepiece(folder / _SENTENCEPIECE)
        else:
            raise FileNotFoundError(
                f"{folder} has neither {_FAST} nor {_SENTENCEPIECE}: give a folder of a tokenizer"
            )

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b {self.max_tokens}"], Bool[np.ndarray, "b {self.max_tokens}"]]:
        """Tokens, padded, and which of them are of the prompt."""
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
"""Tokens of a text with the end mark, and where in the text each begins."""


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
        raise UserError(f"{path} has no token {pad_token[:60]!r} for padding: it is not that of T5 or UMT5")
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
        # In memory: the library waits for pipes, and reads what is no model for a long time.
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        marks = model.pad_id(), model.eos_id()
    if min(marks) < 0:
        raise UserError(f"{path} has no padding or no end mark: it is not that of T5 or UMT5")
    return functools.partial(_split_by, model), marks[0]


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is no regular file: {_AGAIN}")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} is longer than {_MAX_BYTES:,} bytes, which no tokenizer is: {_AGAIN}")


@contextlib.contextmanager
def _named(path: pathlib.Path, what: str) -> Iterator[None]:
    """Names the file in whatever the libraries raise, which is nothing narrow, and in panics of Rust."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{path} is {what} ({str(error)[:200]}): {_AGAIN}") from error
        raise


def _split_by(model: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
    pieces = model.encode(text, out_type="proto").pieces
    return [*(piece.id for piece in pieces), model.eos_id()], [*(piece.begin for piece in pieces), len(text)]
