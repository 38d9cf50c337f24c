"""What a video model is told besides noisy latents and timestep."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int, Latents

__all__ = ["Condition", "PackedCondition", "PromptEncoder", "packed_condition", "with_given"]


class Condition(NamedTuple):
    """Conditions of a batch of clips; a pytree with the batch first, so that two can be joined by it.

    Attributes:
      text: features of the prompts.
      mask: which of them are of the prompt; None where all are seen, as by Wan.
      image: features of an image encoder, for transformers with `image_dim`.
      beside: channels that stand beside the noisy latents, for transformers that take more channels than
        they give (Wan's image to video).
      given: latents that are known.
      is_given: where they are; there the transformer sees them, with timestep 0, and not the noisy ones.
    """

    text: Float[Array, "b l e"]
    mask: Bool[Array, "b l"] | None = None
    image: Float[Array, "i m g"] | None = None
    beside: Float[Array, "b t h w x"] | None = None
    given: Latents | None = None
    is_given: Bool[Array, "b t h w"] | None = None


class PackedCondition(NamedTuple):
    """The prompts of rows of several clips, one after the other; a pytree with the batch first.

    `segment_ids` says which clip of its row, from 1 on, each text token is for.
    """

    text: Float[Array, "b r e"]
    mask: Bool[Array, "b r"]
    segment_ids: Int[Array, "b r"]


def packed_condition(text: Float[Array, "b g l e"], mask: Bool[Array, "b g l"]) -> PackedCondition:
    """The prompts of up to g clips per row: their features, and which of these may be seen."""
    rows, clips, length, width = text.shape
    owner = jnp.broadcast_to(jnp.arange(1, clips + 1)[None, :, None], mask.shape)
    return PackedCondition(
        text.reshape(rows, clips * length, width), mask.reshape(rows, -1), owner.reshape(rows, -1)
    )


@runtime_checkable
class PromptEncoder(Protocol):
    """Prompts to what a transformer is told of them."""

    def __call__(self, prompts: Sequence[str], /) -> Condition:
        """Text features of the prompts, and their mask.

        Raises:
          PromptTooLong: a prompt does not fit, and is not cut.
        """
        ...


def with_given(latents: Latents, condition: Condition) -> Latents:
    """`latents` with those that are given in their places."""
    if condition.given is None or condition.is_given is None:
        return latents
    return jnp.where(condition.is_given[..., None], condition.given, latents)
