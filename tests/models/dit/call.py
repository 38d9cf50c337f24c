"""A transformer's velocity for latents on their grid, one clip per sequence."""

import jax.numpy as jnp

from vidgen.core.streams import CONCAT_LATENTS, IMAGE, TEXT, Stream
from vidgen.core.tokens import Tokens, patchify, unpatchify
from vidgen.nn.embeddings import grid_positions


def grid_tokens(config, latents, **fields):
    grid = config.token_grid(*latents.shape[1:4])
    return Tokens(patchify(latents, config.patch_size), grid_positions(*grid)[None], **fields)


def velocity(dit, latents, timestep, text, text_mask=None, image=None, streams=None, **fields):
    """Velocity on the grid; channels beyond those of the velocity are the stream `concat_latents`.

    `timestep` is of each clip, `b`, or of each token, `b s`; with `time_ids`, what they select from.
    """
    config = dit.config
    known, given = config.velocity_channels, {TEXT: Stream(text, text_mask)}
    if image is not None:
        given[IMAGE] = Stream(image)
    if config.concat_channels:
        given[CONCAT_LATENTS] = Stream(patchify(latents[..., known:], config.patch_size))
        latents = latents[..., :known]
    tokens = grid_tokens(config, latents, **fields)
    if timestep.ndim == 1:
        timestep = timestep[:, None]
    elif tokens.time_ids is None:
        tokens = tokens._replace(time_ids=jnp.tile(jnp.arange(timestep.shape[1]), (len(timestep), 1)))
    patches, _ = dit(tokens, timestep, given | (streams or {}))
    return unpatchify(patches, config.token_grid(*latents.shape[1:4]), config.patch_size)
