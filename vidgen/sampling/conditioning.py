"""The role of a conditioner, which makes a condition of clips in training and of a request in sampling."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from vidgen.core.errors import UserError
from vidgen.core.streams import Stream
from vidgen.core.tokens import Tokens
from vidgen.core.typing import Array, Bool, Float, Video
from vidgen.models.dit.config import DiTConfig
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.sampling.request import Request

__all__ = [
    "Condition",
    "Conditioner",
    "Target",
    "TrainingClips",
    "TrainingConditioner",
    "check_conditioners",
    "merged",
]


class Condition(NamedTuple):
    """What conditioners make for a batch of sequences.

    Attributes:
      streams: of the transformer.
      negative: streams that replace those of the same names where guidance steers away from.
      known_patches: clean patches of the known tokens; arbitrary for others.
      known_mask: true for known tokens.
    """

    streams: Mapping[str, Stream] = {}
    negative: Mapping[str, Stream] = {}
    known_patches: Float[Array, "b s p"] | None = None
    known_mask: Bool[Array, "b s"] | None = None


class TrainingClips(NamedTuple):
    """What a conditioner observes in training.

    Attributes:
      tokens: clean tokens, one sequence per row of the batch.
      clips: number of places for clips in a sequence.
      arrays: arrays of `TrainingConditioner.host`, with leading axes sequence and clip.
      model: the model in training.
      vae: the frozen VAE; None for clips that are latents.
      video: pixels in [-1, 1]; None for clips that are latents.
    """

    tokens: Tokens
    clips: int
    arrays: Mapping[str, Array]
    model: TextToVideo
    vae: VideoVAE | None = None
    video: Video | None = None


class Target(NamedTuple):
    """What a request is sampled with.

    Attributes:
      size: frames, height and width of the videos, in pixels.
      count: number of videos.
      mesh: devices of the model.
    """

    model: TextToVideo
    vae: VideoVAE
    size: tuple[int, int, int]
    count: int
    mesh: Mesh


@runtime_checkable
class Conditioner(Protocol):
    """Makes a condition of a request.

    Attributes:
      fields: fields and `extras` of `Request` that it reads.
      provides: names of the streams that it makes.
    """

    fields: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None:
        """Raises UserError if the transformer or the VAE does not support this condition."""
        ...

    def from_request(self, request: Request, target: Target) -> Condition:
        """Condition of `target.count` videos, one sequence each.

        Raises:
          UserError: a field of the request is missing or does not fit.
        """
        ...


@runtime_checkable
class TrainingConditioner(Conditioner, Protocol):
    """Makes a condition of a request, and of the clips of a batch in training.

    Attributes:
      key_name: name of its random stream.
      needs_video: whether it observes pixels, which packed latents do not have.
    """

    key_name: ClassVar[str]
    needs_video: ClassVar[bool]

    def host(self, captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """Arrays of the captions of each clip of each sequence, which go to the device with the batch.

        Returns:
          Arrays with leading axes sequence and clip; the second may be 1.
        """
        ...

    def host_spec(self, sequences: int, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of `host`; reads no file."""
        ...

    def observe(self, clips: TrainingClips, key: Array) -> Condition:
        """Condition of the clips; `negative` is empty."""
        ...


def merged(conditions: Sequence[Condition]) -> Condition:
    """The union of conditions, of which at most one has known tokens."""
    known = [c for c in conditions if c.known_mask is not None]
    if len(known) > 1:
        raise UserError("two conditioners make tokens known: use one of them")
    streams = {name: stream for c in conditions for name, stream in c.streams.items()}
    negative = {name: stream for c in conditions for name, stream in c.negative.items()}
    return (known[0] if known else Condition())._replace(streams=streams, negative=negative)


def check_conditioners(conditioners: Sequence[Conditioner], dit: DiTConfig, vae: VAEConfig) -> None:
    """Checks that the conditioners make the streams that the transformer takes.

    Raises:
      UserError: a stream is missing, unknown or made twice, or a conditioner does not support the models.
    """
    made: dict[str, Conditioner] = {}
    for conditioner in conditioners:
        for name in conditioner.provides:
            if name in made:
                raise UserError(f"conditioners: {made[name]} and {conditioner} both make the stream {name!r}")
            made[name] = conditioner
        conditioner.check(dit, vae)
    for name, option in dit.stream_options.items():
        if name not in made:
            raise UserError(
                f"dit.{option}: the transformer takes the stream {name!r}, which no conditioner makes: add "
                "one, or change the transformer"
            )
    for name, conditioner in made.items():
        if name not in dit.stream_options:
            raise UserError(
                f"conditioners: {conditioner} makes the stream {name!r}, and the transformer takes "
                f"{', '.join(dit.stream_options)}: remove it, or change the transformer"
            )
