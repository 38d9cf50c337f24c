"""Conditions of a video model: text features, image features, known latents."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int, Latents

__all__ = ["Condition", "PackedCondition", "PromptEncoder", "packed_condition", "with_known"]


class Condition(NamedTuple):
    """Conditions of a batch of clips: a pytree whose leaves have a leading batch axis.

    Attributes:
      text: features of the prompts.
      mask: true for tokens of the prompt; None lets the transformer attend to padding too, as Wan does.
      image: features of an image encoder, for transformers with `image_dim`.
      concat_latents: channels concatenated to the noisy latents, for transformers with more input than output
        channels (Wan's image to video).
      known_latents: clean latents that replace noisy latents under `known_mask`, at timestep 0.
      known_mask: true where latents are known.
    """

    text: Float[Array, "b l e"]
    mask: Bool[Array, "b l"] | None = None
    image: Float[Array, "i m g"] | None = None
    concat_latents: Float[Array, "b t h w x"] | None = None
    known_latents: Latents | None = None
    known_mask: Bool[Array, "b t h w"] | None = None


class PackedCondition(NamedTuple):
    """Concatenated prompts of packed rows: a pytree whose leaves have a leading batch axis.

    Attributes:
      segment_ids: clip of each text token, numbered from 1 within its packed row.
    """

    text: Float[Array, "b r e"]
    mask: Bool[Array, "b r"]
    segment_ids: Int[Array, "b r"]


def packed_condition(text: Float[Array, "b g l e"], mask: Bool[Array, "b g l"]) -> PackedCondition:
    """Concatenates the text features and masks of up to g clips per packed row."""
    batch, clips, length, width = text.shape
    segment_ids = jnp.broadcast_to(jnp.arange(1, clips + 1)[None, :, None], mask.shape)
    return PackedCondition(
        text.reshape(batch, clips * length, width), mask.reshape(batch, -1), segment_ids.reshape(batch, -1)
    )


@runtime_checkable
class PromptEncoder(Protocol):
    """Maps prompts to the text condition of the transformer."""

    def __call__(self, prompts: Sequence[str], /) -> Condition:
        """Condition with the text features of the prompts and their mask.

        Raises:
          PromptTooLong: a prompt exceeds the encoder's limit and the encoder does not truncate.
        """
        ...


def with_known(latents: Latents, condition: Condition) -> Latents:
    """`latents` with the known latents substituted under `known_mask`."""
    if condition.known_latents is None or condition.known_mask is None:
        return latents
    return jnp.where(condition.known_mask[..., None], condition.known_latents, latents)
