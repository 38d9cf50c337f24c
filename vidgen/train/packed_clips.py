"""Clips of different sizes packed into rows of equal token count: a packed batch on the device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Float, Int
from vidgen.models.dit.config import DiTConfig
from vidgen.nn.embeddings import grid_positions

__all__ = ["PackedRows", "host_patches", "pack_rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Packed rows of s tokens, each with up to g clips.

    Attributes:
      patches: latent patches, clip after clip, each in the order time, row, column; 0 in the padding. In the
        dtype of the latents.
      positions: time, row and column of each token in the grid of its clip.
      clip_ids: clip of each token, from 1; 0 is padding.
      captions: g captions per packed row; empty for places without a clip.
    """

    patches: Float[np.ndarray, "b s p"]
    positions: Int[np.ndarray, "b s 3"]
    clip_ids: Int[np.ndarray, "b s"]
    captions: list[list[str]]


def pack_rows(
    rows: Sequence[Sequence[Mapping[str, Any]]],
    dit: DiTConfig,
    *,
    tokens_per_row: int,
    clips_per_row: int,
) -> PackedRows:
    """Packs clips into rows.

    Args:
      rows: the clips of each packed row, with `latents` [t h w c], `caption` and `name`.
      dit: patches and channels of the transformer.

    Raises:
      UserError: a packed row has too many clips or tokens, or a clip does not divide into patches or has
        other channels; the message names the clip.
    """
    count = len(rows)
    dtype = next((clip["latents"].dtype for row in rows for clip in row), np.dtype(np.float16))
    width = int(np.prod(dit.patch_size)) * dit.velocity_channels
    patches = np.zeros((count, tokens_per_row, width), dtype)
    positions = np.zeros((count, tokens_per_row, 3), np.int32)
    clip_ids = np.zeros((count, tokens_per_row), np.int32)
    captions = [[""] * clips_per_row for _ in rows]
    for r, row in enumerate(rows):
        end = 0
        for segment, clip in enumerate(row, start=1):
            try:
                tokens, grid = host_patches(clip["latents"], dit)
            except ValueError as error:
                raise UserError(f"{clip['name']}: {error}") from error
            start, end = end, end + len(tokens)
            if segment > clips_per_row or end > tokens_per_row:
                raise UserError(
                    f"row {r} is full before {clip['name']} ({len(tokens)} tokens): it holds {clips_per_row} "
                    f"clips and {tokens_per_row} tokens"
                )
            patches[r, start:end] = tokens
            positions[r, start:end] = grid_positions(*grid)
            clip_ids[r, start:end] = segment
            captions[r][segment - 1] = clip["caption"]
    return PackedRows(patches=patches, positions=positions, clip_ids=clip_ids, captions=captions)


def host_patches(
    latents: Float[np.ndarray, "t h w c"], dit: DiTConfig
) -> tuple[Float[np.ndarray, "s p"], tuple[int, int, int]]:
    """One clip's patches, in the order of `vidgen.models.dit.model.patchify`, and its tokens per axis.

    Raises:
      UserError: the latents have other channels, or do not divide into patches.
    """
    if latents.shape[-1] != dit.velocity_channels:
        raise UserError(
            f"latents have {latents.shape[-1]} channels, the transformer takes {dit.velocity_channels}"
        )
    t, h, w = dit.token_grid(*latents.shape[:3])
    pt, ph, pw = dit.patch_size
    blocks = latents.reshape(t, pt, h, ph, w, pw, -1)
    return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(t * h * w, -1), (t, h, w)
