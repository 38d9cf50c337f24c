"""Options of the patch transformer, and its named variants."""

import dataclasses
from typing import Annotated, Literal

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.streams import CONCAT_LATENTS, IMAGE, TEXT
from vidgen.nn.layers import FeedForwardKind
from vidgen.nn.stack import Remat
from vidgen.ops.attention import Implementation
from vidgen.ops.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A stream of conditions besides text and images. With initial weights it has no influence.

    Attributes:
      name: of the stream, for instance `boxes`.
      dim: width of its features.
      enters: `cross` is a gated cross-attention in each block, for any number of features per clip; `token`
        adds a projection of each token's feature to the token; `modulation` adds a projection of each clip's
        only feature to the embedding of its timesteps.
    """

    name: str
    dim: Annotated[int, limits.WIDTH]
    enters: Literal["cross", "token", "modulation"] = "cross"

    def __post_init__(self):
        if not self.name.isidentifier() or self.name in (TEXT, IMAGE, CONCAT_LATENTS):
            raise UserError(
                f"streams: the name {self.name!r} must be an identifier other than {TEXT}, {IMAGE} and "
                f"{CONCAT_LATENTS}, which every transformer has"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of the denoising transformer, with the architecture of Wan 2.1 (arXiv 2503.20314).

    Attributes:
      in_channels: channels of the input: noisy latents and, for Wan's image to video, the concatenated mask
        (4 channels) and known latents.
      out_channels: channels of the velocity; None is `in_channels`.
      patch_size: latent frames, rows and columns per token.
      text_dim: width of the text encoder's output.
      image_dim: width of the image encoder's output, to which cross-attention has separate keys and values
        (Wan 2.1's image to video); None is no image encoder.
      image_positions: number of learned position embeddings of image tokens, for models that take two images
        (Wan 2.1's first and last frame to video); 0 is none.
      streams: further conditions.
      freq_dim: width of the sinusoidal timestep embedding.
      ffn: plain or gated feed-forward network.
      dtype: compute dtype of matrix products; weights, norms and modulation are float32.
      remat: residuals saved for the backward pass.
      sequence: method of self-attention over tokens sharded on the mesh axis `context`.
      attention: attention backend; `auto` chooses by device and shape.
    """

    in_channels: Annotated[int, limits.WIDTH] = 16
    out_channels: Annotated[int, limits.WIDTH] | None = None
    patch_size: tuple[
        Annotated[int, limits.PATCH], Annotated[int, limits.PATCH], Annotated[int, limits.PATCH]
    ] = (1, 2, 2)
    model_dim: Annotated[int, limits.WIDTH] = 1536
    num_layers: Annotated[int, limits.LAYERS] = 30
    num_heads: Annotated[int, limits.HEADS] = 12
    ffn_dim: Annotated[int, limits.WIDTH] = 8960
    text_dim: Annotated[int, limits.WIDTH] = 4096
    image_dim: Annotated[int, limits.WIDTH] | None = None
    image_positions: Annotated[int, limits.POSITIONS] = 0
    streams: tuple[StreamConfig, ...] = ()
    freq_dim: Annotated[int, limits.WIDTH] = 256
    ffn: FeedForwardKind = "gelu"
    eps: Annotated[float, limits.EPSILON] = 1e-6
    rope_theta: Annotated[float, limits.POSITIVE] = 10_000.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    sequence: SequenceParallel = SequenceParallel()
    attention: Implementation = "auto"

    def __post_init__(self):
        if self.model_dim % self.num_heads or self.model_dim // self.num_heads % 2:
            raise UserError(
                f"model_dim={self.model_dim} must be an even multiple of num_heads={self.num_heads}, "
                "because rotary embedding rotates pairs of a head's channels"
            )

        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise UserError(f"streams: each needs a name of its own, found {', '.join(names)}")
        if self.image_positions and self.image_dim is None:
            raise UserError(
                f"image_positions={self.image_positions} needs image_dim, the width of the image features"
            )

    @property
    def velocity_channels(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def concat_channels(self) -> int:
        """Channels concatenated to those of the noisy latents."""
        return self.in_channels - self.velocity_channels

    @property
    def stream_options(self) -> dict[str, str]:
        """Streams that the transformer takes, and the option that each comes from."""
        options = {TEXT: "text_dim"}
        if self.image_dim is not None:
            options[IMAGE] = "image_dim"
        if self.concat_channels:
            options[CONCAT_LATENTS] = "in_channels"
        return options | dict.fromkeys((stream.name for stream in self.streams), "streams")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Number of tokens per axis (time, row, column) for latents of this size.

        Raises:
          UserError: the size is not a multiple of `patch_size`.
        """
        size = (frames, height, width)
        if any(n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise UserError(
                f"latents of (frames, height, width) {size} do not divide into patches of {self.patch_size}; "
                "choose a video size whose latents do"
            )
        frames, height, width = (n // p for n, p in zip(size, self.patch_size, strict=True))
        return frames, height, width


_14B = DiTConfig(model_dim=5120, num_layers=40, num_heads=40, ffn_dim=13824)
_CONCAT_LATENTS = {"in_channels": 36, "out_channels": 16}

VARIANTS: dict[str, DiTConfig] = {
    "wan2.1-t2v-1.3b": DiTConfig(),
    "wan2.1-t2v-14b": _14B,
    "wan2.1-i2v-14b": dataclasses.replace(_14B, **_CONCAT_LATENTS, image_dim=1280),
    "wan2.1-flf2v-14b": dataclasses.replace(_14B, **_CONCAT_LATENTS, image_dim=1280, image_positions=514),
    "wan2.2-ti2v-5b": DiTConfig(in_channels=48, model_dim=3072, num_heads=24, ffn_dim=14336),
    # The A14B shapes are of each of the two experts.
    "wan2.2-t2v-a14b": _14B,
    "wan2.2-i2v-a14b": dataclasses.replace(_14B, **_CONCAT_LATENTS),
    "small": DiTConfig(model_dim=384, num_layers=12, num_heads=6, ffn_dim=1536, text_dim=256),
    "nano": DiTConfig(model_dim=192, num_layers=6, num_heads=3, ffn_dim=768, text_dim=128),
    "tiny": DiTConfig(
        in_channels=8, model_dim=96, num_layers=2, num_heads=4, ffn_dim=192, text_dim=64, freq_dim=64
    ),
}
"""Shapes by name: Wan's fit Wan's weights, the others are for training from scratch."""
