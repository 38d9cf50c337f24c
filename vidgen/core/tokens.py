"""Tokens: latents as sequences of spacetime patches, for one clip or several packed clips per sequence."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vidgen.core.typing import Array, Bool, Float, Int, Latents

__all__ = ["Tokens", "patchify", "unpatchify"]

Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """A batch of sequences; each holds one clip, or several packed clips and padding.

    An unpacked batch is a sequence with one clip: `clip_ids` of None says so without an array, so that
    attention has no mask.

    Attributes:
      patches: latents of each token's patch, in the order of `patchify`.
      positions: time, row and column of each token on the grid of its clip.
      clip_ids: clip of each token, from 1 within its sequence; 0 is padding. None is one clip.
      time_ids: index of each token's timestep among those of its sequence; None is the timestep of its clip.
      chunk_ids: chunk of each token, from 0: self-attention is causal over chunks. None is no causality.
      known_mask: true for known tokens, whose patches are clean: timestep 0 and velocity 0. None is no token.
      loss_mask: true for tokens in the loss; None is all that are neither padding nor known.
    """

    patches: Float[Array, "b s p"]
    positions: Int[Array, "#b s 3"] | Int[np.ndarray, "#b s 3"]
    clip_ids: Int[Array, "b s"] | None = None
    time_ids: Int[Array, "b s"] | None = None
    chunk_ids: Int[Array, "b s"] | None = None
    known_mask: Bool[Array, "b s"] | None = None
    loss_mask: Bool[Array, "b s"] | None = None

    def noise_levels(
        self, timestep: Float[Array, "b g"]
    ) -> tuple[Float[Array, "b k"], Int[Array, "b s"] | None]:
        """Timesteps of the sequences, and the index of each token's; None if one timestep is for all tokens.

        Known tokens have timestep 0: with them k is 2 g, and level i + g is 0 for the tokens of level i.
        Padding has index -1, which selects nothing.

        Args:
          timestep: of each clip of a sequence, or what `time_ids` selects from.
        """
        ids = self.time_ids
        if ids is None and self.clip_ids is not None:
            ids = self.clip_ids - 1
        elif ids is not None and self.clip_ids is not None:
            ids = jnp.where(self.clip_ids > 0, ids, -1)
        if self.known_mask is None:
            return timestep, ids
        ids = jnp.zeros(self.known_mask.shape, jnp.int32) if ids is None else ids
        levels = jnp.concatenate([timestep, jnp.zeros_like(timestep)], axis=1)
        return levels, jnp.where(self.known_mask & (ids >= 0), ids + timestep.shape[1], ids)

    def of_clips(self, clips: int) -> Bool[Array, "b s g"]:
        """Whether a token belongs to each of the sequence's `clips` clips; padding belongs to none."""
        if self.clip_ids is None:
            return jnp.ones((*self.patches.shape[:2], 1), bool)
        return self.clip_ids[..., None] == jnp.arange(1, clips + 1)[None, None]

    def counted(self) -> Bool[Array, "b s"] | None:
        """Mask of the tokens in the loss; None is all."""
        if self.loss_mask is not None:
            return self.loss_mask
        masks = [
            *([] if self.clip_ids is None else [self.clip_ids > 0]),
            *([] if self.known_mask is None else [~self.known_mask]),
        ]
        return masks[0] & masks[-1] if masks else None


def patchify(latents: Latents, patch: Patch) -> Float[Array, "b s p"]:
    """Patches in order time, row, column; values within a patch in order frame, row, column, channel."""
    b, t, h, w, c = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7)).reshape(b, -1, pt * ph * pw * c)


def unpatchify(patches: Float[Array, "b s p"], grid: tuple[int, int, int], patch: Patch) -> Latents:
    """Inverse of `patchify`; `grid` is the number of tokens over time, rows and columns."""
    b, (t, h, w), (pt, ph, pw) = patches.shape[0], grid, patch
    x = jnp.transpose(patches.reshape(b, t, h, w, pt, ph, pw, -1), (0, 1, 4, 2, 5, 3, 6, 7))
    return x.reshape(b, t * pt, h * ph, w * pw, -1)
