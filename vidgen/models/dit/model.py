"""The patch transformer: noisy latents, timesteps and text features to velocity."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from vidgen.core.typing import Array, Bool, Float, Latents
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.modules import Block, ConditionEmbedder, Head
from vidgen.nn.embeddings import grid_positions, rope_angles
from vidgen.nn.layers import Linear
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.parallel.rules import constrain


class DiT(nnx.Module):
    """Diffusion transformer over spacetime patches (arXiv 2212.09748), in the form of Wan 2.1."""

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
        timestep: Float[Array, "b"] | Float[Array, "b s"],
        text: Float[Array, "b l e"],
        text_mask: Bool[Array, "b l"] | None = None,
        image: Float[Array, "i m g"] | None = None,
    ) -> Float[Array, "b tz hz wz v"]:
        """Velocity (noise - clean latents) in float32, as many frames, rows and columns as the latents.

        Args:
          latents: noisy, normalised latents, and in further channels what is given beside them.
          timestep: in [0, 1], 1 is noise: one per clip, or one per token in order time, row, column
            (a latent that is given has timestep 0).
          text: features of the text encoder; `text_mask` says which are of the prompt, at least one per clip;
            without it all are seen, as by Wan, whose features beyond the prompt are zeros.
          image: features of the image encoder, for a model with `image_dim`: of one image per clip, or of
            first and last frames by turns for one with `image_positions`.

        Raises:
          ValueError: the latents do not divide into patches, or their channels are not `in_channels`; an
            image is missing, or given to a model that takes none.
        """
        config = self.config
        if latents.shape[-1] != config.in_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels, the model takes {config.in_channels}"
            )
        if (image is None) != (config.image_dim is None):
            expected = "takes none" if config.image_dim is None else "needs them (image_dim)"
            raise ValueError(
                f"features of an image are {'missing' if image is None else 'given'}; the model {expected}"
            )
        grid = config.token_grid(*latents.shape[1:4])
        angles = rope_angles(grid_positions(*grid)[None], config.head_dim, theta=config.rope_theta)
        embedded, modulation = self.condition_embedder.time(
            timestep[:, None] if timestep.ndim == 1 else timestep
        )
        x = self.patch_embedding(patchify(latents.astype(config.dtype), config.patch_size))
        x = apply_stack(
            self.blocks,
            constrain(x, "batch", "tokens", None),
            _apply_block,
            remat=config.remat,
            modulation=modulation,
            angles=angles,
            text=self.condition_embedder.text(text.astype(config.dtype)),
            text_mask=text_mask,
            image=self._image(image),
        )
        return unpatchify(self.head(x, embedded).astype(jnp.float32), grid, config.patch_size)

    def _image(self, features: Array | None) -> Array | None:
        if features is None:
            return None
        assert self.condition_embedder.image is not None
        return self.condition_embedder.image(features.astype(self.config.dtype))


def _apply_block(block: Block, x: Array, **conditions: Any) -> Array:
    return constrain(block(x, **conditions), "batch", "tokens", None)


def patchify(latents: Latents, patch: tuple[int, int, int]) -> Float[Array, "b s p"]:
    """Tokens in order time, row, column; within a token frame, row, column, channel (slowest first)."""
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
