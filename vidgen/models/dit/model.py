"""The patch transformer: maps noisy latents, timesteps and text features to velocity."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Bool, Float, Int, Latents
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.modules import Block, ConditionEmbedder, Head
from vidgen.nn.embeddings import grid_positions, rope_angles
from vidgen.nn.layers import Linear
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.ops.key_ranges import cross_attention_ranges, self_attention_ranges
from vidgen.parallel.rules import constrain


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
        latents: Latents,
        timestep: Float[Array, "b"] | Float[Array, "b g"],
        text: Float[Array, "b l e"],
        text_mask: Bool[Array, "b l"] | None = None,
        image: Float[Array, "i m e2"] | None = None,
        run_blocks: "RunBlocks | None" = None,
        time_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b tz hz wz v"]:
        """Velocity (noise - clean latents), float32, on the grid of the latents.

        Args:
          latents: noisy, normalised latents, with concatenated latents in further channels.
          timestep: timesteps in [0, 1], where 1 is pure noise: one per clip; or g per clip, with one selected
            for each token by `time_ids` (known latents have timestep 0); or one per token, without
            `time_ids`. Tokens are in order time, row, column.
          text: features of the text encoder.
          text_mask: true for tokens of the prompt, at least one per clip; None attends to all, as Wan does
            with features that are zero beyond the prompt.
          image: features of the image encoder, for a model with `image_dim`: one image per clip, or
            alternating first and last frames for a model with `image_positions`.
          run_blocks: replaces `apply_blocks`.
          time_ids: index of each token's timestep.

        Raises:
          UserError: the latents do not divide into patches, or do not have `in_channels` channels; the image
            is missing, or is given to a model without `image_dim`.
        """
        config = self.config
        if latents.shape[-1] != config.in_channels:
            raise UserError(
                f"latents have {latents.shape[-1]} channels, the model takes {config.in_channels}"
            )
        if (image is None) != (config.image_dim is None):
            expected = "takes none" if config.image_dim is None else "needs them (image_dim)"
            raise UserError(
                f"features of an image are {'missing' if image is None else 'given'}; the model {expected}"
            )
        grid = config.token_grid(*latents.shape[1:4])
        tokens = self.tokens(
            patchify(latents, config.patch_size),
            timestep[:, None] if timestep.ndim == 1 else timestep,
            text,
            positions=grid_positions(*grid)[None],
            text_mask=text_mask,
            image=image,
            run_blocks=run_blocks,
            time_ids=time_ids,
        )
        return unpatchify(tokens, grid, config.patch_size)

    def tokens(
        self,
        patches: Float[Array, "b s p"],
        timestep: Float[Array, "b g"],
        text: Float[Array, "b l e"],
        *,
        positions: Int[Array, "#b s 3"] | Int[np.ndarray, "#b s 3"],
        text_mask: Bool[Array, "b l"] | None = None,
        segment_ids: tuple[Int[Array, "b s"], Int[Array, "b l"]] | None = None,
        image: Float[Array, "i m e2"] | None = None,
        run_blocks: "RunBlocks | None" = None,
        time_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s q"]:
        """Velocity of each token's patch, float32, for one clip per batch row or several packed clips.

        Args:
          patches: patches from `patchify`.
          timestep: timesteps of a batch row: one for all tokens (g = 1), one per token, or g that `time_ids`
            selects from.
          time_ids: index of each token's timestep; None if there is one timestep or one per token. With
            indices, vectors of the model's width are computed per timestep instead of per token.
          positions: time, row and column of each token on the grid of its clip.
          segment_ids: for packed clips, the clip of each token and of each text token.
        """
        x, embedded, conditions = self.embed(
            patches,
            timestep,
            text,
            positions=positions,
            text_mask=text_mask,
            segment_ids=segment_ids,
            image=image,
            time_ids=time_ids,
        )
        x = (run_blocks or type(self).apply_blocks)(self, x, conditions)
        return self.head(x, embedded, time_ids).astype(jnp.float32)

    def embed(
        self,
        patches: Float[Array, "b s p"],
        timestep: Float[Array, "b g"],
        text: Float[Array, "b l e"],
        *,
        positions: Int[Array, "#b s 3"] | Int[np.ndarray, "#b s 3"],
        text_mask: Bool[Array, "b l"] | None = None,
        segment_ids: tuple[Int[Array, "b s"], Int[Array, "b l"]] | None = None,
        image: Float[Array, "i m e2"] | None = None,
        time_ids: Int[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b g d"], dict[str, Any]]:
        """Tokens, embedded timesteps and conditions, for `apply_blocks` and `head`; arguments as `tokens`."""
        config = self.config
        per_token = time_ids is None and timestep.shape[1] > 1
        embedded, modulation = self.condition_embedder.time(timestep, per_token=per_token)
        conditions = {
            "modulation": modulation,
            "time_ids": time_ids,
            "angles": rope_angles(positions, config.head_dim, theta=config.rope_theta),
            "text": self.condition_embedder.text(text.astype(config.dtype)),
            "token_ranges": self_attention_ranges(None if segment_ids is None else segment_ids[0]),
            "text_ranges": cross_attention_ranges(patches.shape[1], clip_ids=segment_ids, key_mask=text_mask),
            "image": self._image(image),
        }
        x = self.patch_embedding(patches.astype(config.dtype))
        return constrain(x, "batch", "tokens", None), embedded, conditions

    def apply_blocks(self, x: Float[Array, "b s d"], conditions: dict[str, Any]) -> Float[Array, "b s d"]:
        """Tokens after the last block."""
        return apply_stack(self.blocks, x, Block.__call__, remat=self.config.remat, **conditions)[0]

    def _image(self, features: Array | None) -> Array | None:
        if features is None:
            return None
        assert self.condition_embedder.image is not None
        return self.condition_embedder.image(features.astype(self.config.dtype))


RunBlocks = Callable[[DiT, Array, dict[str, Any]], Array]
"""Replaces `DiT.apply_blocks`: (dit, tokens, conditions) -> tokens after the last block."""


def patchify(latents: Latents, patch: tuple[int, int, int]) -> Float[Array, "b s p"]:
    """Patches in order time, row, column; values within a patch in order frame, row, column, channel."""
    b, t, h, w, c = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7)).reshape(b, -1, pt * ph * pw * c)


def unpatchify(
    tokens: Float[Array, "b s p"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Latents:
    """Inverse of `patchify`."""
    b, (t, h, w), (pt, ph, pw) = tokens.shape[0], grid, patch
    x = jnp.transpose(tokens.reshape(b, t, h, w, pt, ph, pw, -1), (0, 1, 4, 2, 5, 3, 6, 7))
    return x.reshape(b, t * pt, h * ph, w * pw, -1)
