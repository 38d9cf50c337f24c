"""Byte-level tokenizer of prompts."""

from collections.abc import Sequence

import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Bool, Int

END = 256
PADDING = 257
VOCABULARY = 258


class PromptTooLong(UserError):
    """A prompt has more bytes than the text encoder accepts."""


def tokenize(
    prompts: Sequence[str], max_bytes: int, *, truncate: bool = False
) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
    """Token ids of prompts: UTF-8 bytes, an end mark, and padding; l = max_bytes + 1.

    Args:
      truncate: truncate long prompts instead of raising (training captions).

    Returns:
      Token ids (int32) and a mask that is false for padding; the end mark is always present.

    Raises:
      PromptTooLong: a prompt exceeds `max_bytes`; quotes the excess.
    """
    tokens = np.full((len(prompts), max_bytes + 1), PADDING, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        data = prompt.encode("utf-8")
        if len(data) > max_bytes:
            if not truncate:
                lost = data[max_bytes:].decode("utf-8", errors="ignore")
                raise PromptTooLong(
                    f"the prompt has {len(data)} bytes, the text encoder takes {max_bytes}; "
                    f"shorten it by this end: {lost!r}"
                )
            data = data[:max_bytes].decode("utf-8", errors="ignore").encode("utf-8")
        row[: len(data)] = np.frombuffer(data, np.uint8)
        row[len(data)] = END
    return tokens, tokens != PADDING
