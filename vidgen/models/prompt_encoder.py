"""The role of a text encoder."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from vidgen.core.streams import Stream

__all__ = ["PromptEncoder"]


@runtime_checkable
class PromptEncoder(Protocol):
    """Maps prompts to the transformer's stream `text`."""

    def __call__(self, prompts: Sequence[str], /) -> Stream:
        """Text features of the prompts and their mask, one clip per prompt.

        Raises:
          PromptTooLong: a prompt exceeds the encoder's limit and the encoder does not truncate.
        """
        ...
