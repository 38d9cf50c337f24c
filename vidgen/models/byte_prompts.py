"""Prompt encoding by the byte encoder of a video model."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vidgen.core.errors import UserError
from vidgen.core.streams import Stream
from vidgen.core.typing import Array, Bool, Int
from vidgen.models.text.tokenizer import tokenize
from vidgen.models.text_to_video import TextToVideo

__all__ = ["BytePrompts"]


class BytePrompts:
    """`PromptEncoder` that uses the byte encoder of a video model."""

    def __init__(self, model: TextToVideo):
        """Stores the model.

        Args:
          model: a model with a byte encoder.

        Raises:
          UserError: the model has no byte encoder.
        """
        if model.text is None:
            raise UserError("the model has no built-in text encoder: pass features of the prompts instead")
        self._model = model
        self._max_bytes = model.text.config.max_bytes

    def __call__(self, prompts: Sequence[str]) -> Stream:
        tokens, mask = tokenize(prompts, self._max_bytes)
        return _encode(self._model, jnp.asarray(tokens), jnp.asarray(mask))


@jax.jit
def _encode(model: TextToVideo, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Stream:
    return model.encode_text(tokens, mask)
