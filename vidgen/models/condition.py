"""Conditions of a video model: text, image features, known latents."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int, Latents

__all__ = ["Condition", "PackedCondition", "PromptEncoder", "packed_condition", "with_known"]


class Condition(NamedTuple):
    """Conditions of a batch of clips: a pytree whose leaves have the batch first.

    Attributes:
      text: features of the prompts.
      mask: true for tokens of the prompt; None lets the transformer attend to all, as Wan does.
      image: features of an image encoder, for transformers with `image_dim`.
      concat_latents: channels concatenated to the noisy latents, for transformers with more input than output
        channels (Wan's image to video).
      known_latents: clean latents that replace the noisy ones under `known_mask`, with timestep 0.
      known_mask: true where latents are known.
    """

    text: Float[Array, "b l e"]
    mask: Bool[Array, "b l"] | None = None
    image: Float[Array, "i m g"] | None = None
    concat_latents: Float[Array, "b t h w x"] | None = None
    known_latents: Latents | None = None
    known_mask: Bool[Array, "b t h w"] | None = None


class PackedCondition(NamedTuple):
    """Prompts of packed rows, one clip's after the other's; a pytree whose leaves have the batch first.

    Attributes:
      segment_ids: the clip of each text token, numbered from 1 in its row.
    """

    text: Float[Array, "b r e"]
    mask: Bool[Array, "b r"]
    segment_ids: Int[Array, "b r"]


def packed_condition(text: Float[Array, "b g l e"], mask: Bool[Array, "b g l"]) -> PackedCondition:
    """Joins the text features and masks of up to g clips per row."""
    rows, clips, length, width = text.shape
    owner = jnp.broadcast_to(jnp.arange(1, clips + 1)[None, :, None], mask.shape)
    return PackedCondition(
        text.reshape(rows, clips * length, width), mask.reshape(rows, -1), owner.reshape(rows, -1)
    )


@runtime_checkable
class PromptEncoder(Protocol):
    """Prompts -> text condition of the transformer."""

    def __call__(self, prompts: Sequence[str], /) -> Condition:
        """Text features of the prompts, and their mask.

        Raises:
          PromptTooLong: a prompt does not fit, and is not cut.
        """
        ...


def with_known(latents: Latents, condition: Condition) -> Latents:
    """`latents`, with the known ones in their places."""
    if condition.known_latents is None or condition.known_mask is None:
        return latents
    return jnp.where(condition.known_mask[..., None], condition.known_latents, latents)
