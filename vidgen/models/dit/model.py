"""The patch transformer: maps noisy tokens, timesteps and streams of conditions to velocity."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.streams import CONCAT_LATENTS, IMAGE, TEXT, Stream, Streams
from vidgen.core.tokens import Tokens
from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.modules import Block, ConditionEmbedder, Head
from vidgen.models.dit.streams import AttendedStream
from vidgen.nn.embeddings import rope_angles
from vidgen.nn.layers import Linear
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.ops.key_ranges import KeyRanges, cross_attention_ranges, self_attention_ranges
from vidgen.parallel.rules import constrain

__all__ = ["DiT", "ResidualCache", "Transformer"]


class ResidualCache(NamedTuple):
    """Residual of the blocks from an earlier step, which a step may reuse instead of computing the blocks.

    Attributes:
      residual: the blocks' output minus their input.
      compute: true if this step computes the blocks.
    """

    residual: Float[Array, "b s d"]
    compute: Bool[Array, ""]


@runtime_checkable
class Transformer(Protocol):
    """The velocity function: `DiT`, or the experts of Wan 2.2."""

    @property
    def config(self) -> DiTConfig: ...

    def __call__(
        self,
        tokens: Tokens,
        timestep: Float[Array, "b g"],
        streams: Streams,
        cache: ResidualCache | None = None,
    ) -> tuple[Float[Array, "b s q"], ResidualCache | None]:
        """Velocity, and the cache for the next step, as `DiT.__call__`."""
        ...


class DiT(nnx.Module):
    """Diffusion transformer over spacetime patches (arXiv 2212.09748), with Wan 2.1's architecture."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        pt, ph, pw = config.patch_size
        patch = pt * ph * pw
        self.config = config
        self.patch_embedding = Linear(
            patch * config.in_channels, config.model_dim, axes=("patch", "embed"), rngs=rngs
        )
        self.condition_embedder = ConditionEmbedder(config, rngs=rngs)
        self.blocks = make_stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.head = Head(config, patch * config.velocity_channels, rngs=rngs)

    def __call__(
        self,
        tokens: Tokens,
        timestep: Float[Array, "b g"],
        streams: Streams,
        cache: ResidualCache | None = None,
    ) -> tuple[Float[Array, "b s q"], ResidualCache | None]:
        """Velocity (noise - clean latents) of each token's patch, float32; 0 for known tokens.

        The velocity of a packed clip equals that of the clip alone.

        Args:
          tokens: patches of noisy, normalised latents.
          timestep: timesteps in [0, 1], where 1 is pure noise, of each clip of a sequence.
          streams: `text`, with an unmasked feature per clip; without a mask tokens attend to all features,
            as in Wan, whose features are zero beyond the prompt. `image` for a model with `image_dim`: one
            image per clip, or first and last frames in turn for a model with `image_positions`.
            `concat_latents` for a model with more input than velocity channels: a feature per token, in the
            order of `patchify`. The streams of `config.streams`.
          cache: residual of an earlier step; None computes the blocks.

        Returns:
          Velocity, and the residual of this step if `cache` is given.

        Raises:
          UserError: the patches have another number of channels, or a stream is missing or unknown.
        """
        _check_streams(self.config, tokens, streams)
        x, embedded, time_ids, conditions = self.embed(tokens, timestep, streams)
        if cache is None:
            x, _ = apply_stack(self.blocks, x, Block.__call__, remat=self.config.remat, **conditions)
        else:
            x, residual = jax.lax.cond(cache.compute, self._compute, _reuse, x, cache.residual, conditions)
            cache = cache._replace(residual=residual)
        velocity = self.head(x, embedded, time_ids).astype(jnp.float32)
        if tokens.known_mask is not None:
            # The loss leaves known tokens out, so the network's output there is arbitrary.
            velocity = jnp.where(tokens.known_mask[..., None], 0.0, velocity)
        return velocity, cache

    def embed(
        self, tokens: Tokens, timestep: Float[Array, "b g"], streams: Streams
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b k d"], Int[Array, "b s"] | None, dict[str, Any]]:
        """Inputs of the blocks and the head: tokens, embedded levels, level of each token, conditions."""
        config, embedder = self.config, self.condition_embedder
        x = self.patch_embedding(_concatenated(tokens.patches, streams, config).astype(config.dtype))
        attended = {TEXT: embedder.text(streams[TEXT].features.astype(config.dtype))}
        if embedder.image is not None:
            attended[IMAGE] = embedder.image(streams[IMAGE].features.astype(config.dtype))
        of_clips = None
        if embedder.streams is not None:
            x = x + embedder.streams.per_token(streams)
            attended |= embedder.streams.attended(streams)
            of_clips = embedder.streams.per_clip(streams, 1 if tokens.clip_ids is None else timestep.shape[1])
        levels, time_ids = tokens.noise_levels(timestep)
        embedded, modulation = embedder.time(levels, of_clips)
        conditions = {
            "modulation": modulation,
            "time_ids": time_ids,
            "angles": rope_angles(tokens.positions, config.head_dim, theta=config.rope_theta),
            "token_ranges": self_attention_ranges(tokens.clip_ids, tokens.chunk_ids),
            "streams": {
                name: AttendedStream(features, _stream_ranges(tokens, streams[name]))
                for name, features in attended.items()
            },
        }
        return constrain(x, "batch", "tokens", None), embedded, time_ids, conditions

    def _compute(
        self, x: Array, _: Array, conditions: dict[str, Any]
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"]]:
        y, _ = apply_stack(self.blocks, x, Block.__call__, remat=self.config.remat, **conditions)
        return y, y - x


def _stream_ranges(tokens: Tokens, stream: Stream) -> KeyRanges | None:
    """Which features of a stream each token sees: those of its clip."""
    clip_ids = None
    if tokens.clip_ids is not None and stream.clip_ids is not None:
        clip_ids = tokens.clip_ids, stream.clip_ids
    return cross_attention_ranges(tokens.patches.shape[1], clip_ids=clip_ids, key_mask=stream.mask)


def _reuse(x: Array, residual: Array, _: dict[str, Any]) -> tuple[Array, Array]:
    return x + residual, residual


def _check_streams(config: DiTConfig, tokens: Tokens, streams: Streams) -> None:
    pt, ph, pw = config.patch_size
    channels, rest = divmod(tokens.patches.shape[-1], pt * ph * pw)
    if rest or channels != config.velocity_channels:
        raise UserError(
            f"patches have {tokens.patches.shape[-1]} values, {channels} channels of {pt} x {ph} x {pw}; "
            f"the model takes {config.velocity_channels} channels"
        )
    expected = config.stream_options
    for name, option in expected.items():
        if name not in streams:
            raise UserError(f"the stream {name!r} is missing, which the model needs ({option})")
    for name in streams:
        if name not in expected:
            raise UserError(f"the model takes no stream {name!r}; it takes {', '.join(expected)}")


def _concatenated(patches: Float[Array, "b s p"], streams: Streams, config: DiTConfig) -> Array:
    """Patches whose channels are those of the latents, then those of the stream `concat_latents`."""
    if not config.concat_channels:
        return patches
    b, s, _ = patches.shape
    parts = (patches, streams[CONCAT_LATENTS].features)
    x = [
        part.reshape(b, s, -1, n)
        for part, n in zip(parts, (config.velocity_channels, config.concat_channels), strict=True)
    ]
    return jnp.concatenate(x, axis=-1).reshape(b, s, -1)
