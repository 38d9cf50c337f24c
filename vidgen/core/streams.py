"""Streams: the named conditions of a video model, such as the features of prompts or of images."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from vidgen.core.typing import Array, Bool, Float, Int

__all__ = ["CONCAT_LATENTS", "IMAGE", "TEXT", "Stream", "Streams", "packed_stream"]

TEXT, IMAGE, CONCAT_LATENTS = "text", "image", "concat_latents"
"""Names of the streams of Wan's models: prompts, images, and channels concatenated to the noisy latents."""


class Stream(NamedTuple):
    """Features of one kind of condition.

    Attributes:
      features: feature vectors. A stream that enters by tokens has one for each token of the sequence.
      mask: true for vectors that may be attended to, at least one per clip; None is all.
      clip_ids: clip of each vector, from 1 within its sequence, as in `Tokens`; None is one clip.
    """

    features: Float[Array, "b r e"]
    mask: Bool[Array, "b r"] | None = None
    clip_ids: Int[Array, "b r"] | None = None


Streams: TypeAlias = Mapping[str, Stream]


def packed_stream(stream: Stream, clips: int) -> Stream:
    """Concatenates the features of each `clips` consecutive clips to those of one sequence."""
    if clips == 1:
        return stream
    count, length, width = stream.features.shape
    sequences = count // clips
    ids = jnp.repeat(jnp.arange(1, clips + 1), length)
    return Stream(
        stream.features.reshape(sequences, clips * length, width),
        None if stream.mask is None else stream.mask.reshape(sequences, -1),
        jnp.broadcast_to(ids[None], (sequences, clips * length)),
    )
