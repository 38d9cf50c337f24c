"""Captions as conditions in training: of the byte encoder, which is trained, or of a large text encoder."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.streams import TEXT, Stream, packed_stream
from vidgen.core.typing import Array
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.dit.config import DiTConfig
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.tokenizer import tokenize
from vidgen.models.video_vae.config import VAEConfig
from vidgen.sampling.conditioners import Prompts
from vidgen.sampling.conditioning import Condition, Target, TrainingClips
from vidgen.sampling.request import Request
from vidgen.train.text_features import TextFeatures

__all__ = ["ByteCaptions", "EncodedCaptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Captions:
    """Base: with probability `dropout` a clip is trained with the empty caption, for guidance."""

    fields: ClassVar[frozenset[str]] = frozenset({"prompt", "negative_prompt"})
    provides: ClassVar[frozenset[str]] = frozenset({TEXT})
    key_name: ClassVar[str] = "caption"
    needs_video: ClassVar[bool] = False

    dropout: float

    def check(self, dit: DiTConfig, vae: VAEConfig) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteCaptions(_Captions):
    """Captions for the model's byte encoder."""

    config: ByteEncoderConfig

    def host(self, captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        flat = [caption for sequence in captions for caption in sequence]
        tokens, mask = tokenize(flat, self.config.max_bytes, truncate=True)
        shape = (len(captions), -1, tokens.shape[-1])
        return {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}

    def host_spec(self, sequences: int, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (sequences, clips, self.config.max_bytes + 1)
        return {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def observe(self, clips: TrainingClips, key: Array) -> Condition:
        tokens, mask = (clips.arrays[name] for name in ("tokens", "mask"))
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
        empty_tokens, empty_mask = tokenize([""], self.config.max_bytes)
        drop = jax.random.bernoulli(key, self.dropout, (len(tokens), 1))
        text = clips.model.encode_text(
            jnp.where(drop, empty_tokens, tokens), jnp.where(drop, empty_mask, mask)
        )
        return Condition({TEXT: packed_stream(text, clips.clips)})

    def from_request(self, request: Request, target: Target) -> Condition:
        return Prompts(encode=BytePrompts(target.model)).from_request(request, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedCaptions(_Captions):
    """Caption features of a large text encoder, which is not trained.

    Attributes:
      dim: width of the features.
    """

    encoder: TextFeatures
    dim: int

    def host(self, captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        flat = [caption for sequence in captions for caption in sequence]
        unique = list(dict.fromkeys(["", *flat]))
        features = self.encoder.features(unique)
        text = features[[unique.index(caption) for caption in flat]]
        shape = (len(captions), -1, *text.shape[1:])
        empty = np.broadcast_to(features[:1][None], (len(captions), 1, *text.shape[1:]))
        return {"text": text.reshape(shape), "empty_text": empty}

    def host_spec(self, sequences: int, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        of = lambda count: jax.ShapeDtypeStruct(  # noqa: E731
            (sequences, count, self.encoder.max_tokens, self.dim), jnp.dtype(self.encoder.dtype)
        )
        return {"text": of(clips), "empty_text": of(1)}

    def observe(self, clips: TrainingClips, key: Array) -> Condition:
        text = clips.arrays["text"]
        drop = jax.random.bernoulli(key, self.dropout, (*text.shape[:2], 1, 1))
        text = jnp.where(drop, clips.arrays["empty_text"], text).astype(jnp.float32)
        stream = Stream(text.reshape(-1, *text.shape[2:]))
        return Condition({TEXT: packed_stream(stream, clips.clips)})

    def from_request(self, request: Request, target: Target) -> Condition:
        return Prompts(encode=self.encoder.prompts(target.mesh)).from_request(request, target)
