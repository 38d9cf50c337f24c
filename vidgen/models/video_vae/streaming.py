"""Videos of any length through the VAE group by group: memory does not grow with the duration.

Frame 0 is a group of its own; each of the others is `group` latent frames. The results are those of the whole
video at once: what a group needs of earlier ones is carried along.

On a mesh in context (`jax.set_mesh`), frames are cut over the devices, width over `context` and height over
`tensor`, where these divide the latents' width and height; the results are the same. `tiles` are for one
device that is too small for whole frames; the results are not quite the same.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Latents, UInt8, Video
from vidgen.models.video_vae.model import VideoVAE
from vidgen.models.video_vae.tiling import Tiles
from vidgen.nn.layers import CausalCache

__all__ = ["decode", "decode_stream", "encode", "encode_stream", "fill_sides", "padded_frames"]

Kept = tuple[Array, ...]
"""What one group leaves to the next: the last frames that each causal layer has seen."""


def encode(vae: VideoVAE, video: Video, *, group: int = 1, tiles: Tiles | None = None) -> Latents:
    """`vae.encode` as a scan over groups of frames.

    Args:
      video: in [-1, 1]; 1 + n * temporal_factor frames.
      group: latent frames per step.
      tiles: one after the other, the whole of each.
    """
    step, size = functools.partial(_encode_group, vae), vae.config.temporal_factor * group
    return _per_tile(lambda x: _scan(step, x, size), video, tiles, *_factors(vae, encoding=True))


def decode(
    vae: VideoVAE,
    latents: Latents,
    *,
    group: int = 1,
    tiles: Tiles | None = None,
    emit: Callable[[Video], Array] = lambda video: video,
) -> Array:
    """`vae.decode` as a scan over groups of latent frames.

    Args:
      group: latent frames per step.
      tiles: one after the other, the whole of each; blended before `emit`.
      emit: applied to each group's frames, for a smaller result (`vidgen.core.pixels.to_uint8`).

    Returns:
      Frames `b t h w 3`, in [-1, 1] and not clipped but for what `emit` does.
    """
    step = functools.partial(_decode_group, vae)
    if tiles is not None:
        return emit(
            _per_tile(lambda x: _scan(step, x, group), latents, tiles, *_factors(vae, encoding=False))
        )

    def emitting(x: Array, kept: Kept | None) -> tuple[Array, Kept]:
        frames, kept = step(x, kept)
        return emit(frames), kept

    return _scan(emitting, latents, group)


def encode_stream(
    vae: VideoVAE, frames: Iterable[np.ndarray], *, group: int = 1, tiles: Tiles | None = None
) -> Iterator[Latents]:
    """Latents of a video that arrives frame by frame, as soon as each group is whole.

    Args:
      frames: `b h w 3` in [-1, 1] each, any number. If they do not fill the last group, its last frame is
        repeated; `decode_stream` crops if it is told the number of frames.
      tiles: what the device holds at a time; what is kept of the others waits on the host.

    Yields:
      Normalised latents `b t h w c`: one latent frame for frame 0, then `group` at a time.

    Raises:
      UserError: a frame has another size than the first, or pixels that are not finite; names it.
    """
    step = _step(_jit_encode_group, vae, tiles, *_factors(vae, encoding=True))
    kept = None
    size = vae.config.temporal_factor * group
    for block in _blocks(frames, size, vae.config.temporal_factor):
        latents, kept = step(jnp.asarray(block), kept)
        yield latents


def decode_stream(
    vae: VideoVAE,
    latents: Iterable[Latents],
    *,
    num_frames: int | None = None,
    tiles: Tiles | None = None,
) -> Iterator[Video]:
    """Frames of a video, handed out group by group while later ones are still to be computed.

    Args:
      latents: blocks `b t h w c` of any length, as `encode_stream` yields them.
      num_frames: frames to hand out in all; None is all there are.
      tiles: what the device holds at a time; what is kept of the others waits on the host.

    Yields:
      Frames `b t h w 3` in [-1, 1], float32, not clipped.
    """
    step = _step(_jit_decode_group, vae, tiles, *_factors(vae, encoding=False))
    kept = None
    left = num_frames
    for block in _first_alone(latents):
        if left is not None and left <= 0:
            return
        frames, kept = step(block, kept)
        if left is not None:
            frames, left = frames[:, :left], left - frames.shape[1]
        yield frames


def padded_frames(num_frames: int, temporal_factor: int) -> int:
    """The smallest 1 + n * temporal_factor that is not less than `num_frames`."""
    return num_frames + (1 - num_frames) % temporal_factor


def fill_sides(frame: UInt8[np.ndarray, "h w 3"], spatial_factor: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The frame with its last row and column repeated until the VAE divides its sides."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, -height % spatial_factor), (0, -width % spatial_factor), (0, 0)), mode="edge")


def _encode_group(vae: VideoVAE, video: Video, kept: Kept | None) -> tuple[Latents, Kept]:
    cache = CausalCache(kept)
    latents = vae.encode(video, cache)
    return latents, tuple(cache.new_frames)


def _decode_group(vae: VideoVAE, latents: Latents, kept: Kept | None) -> tuple[Video, Kept]:
    cache = CausalCache(kept)
    video = vae.decode(latents, cache)
    return video, tuple(cache.new_frames)


_jit_encode_group = jax.jit(_encode_group, donate_argnames="kept")
_jit_decode_group = jax.jit(_decode_group, donate_argnames="kept")


def _factors(vae: VideoVAE, *, encoding: bool) -> tuple[int, int]:
    """Pixels per latent pixel of what goes in, and of what comes out."""
    return (vae.config.spatial_factor, 1) if encoding else (1, vae.config.spatial_factor)


def _per_tile(
    run: Callable[[Array], Array], x: Array, tiles: Tiles | None, factor_in: int, factor_out: int
) -> Array:
    if tiles is None:
        return run(x)
    parts = jax.lax.map(run, jnp.stack(tiles.split(x, factor_in)))
    return tiles.blend(list(parts), x.shape[2] // factor_in, x.shape[3] // factor_in, factor_out)


def _step(
    run: Callable[..., tuple[Array, Kept]],
    vae: VideoVAE,
    tiles: Tiles | None,
    factor_in: int,
    factor_out: int,
) -> Callable[[Array, Any], tuple[Array, Any]]:
    """A group from what is kept of the one before, tile by tile if there are `tiles`."""
    if tiles is None:
        return functools.partial(run, vae)

    def step(x: Array, kept: list[Any] | None) -> tuple[Array, list[Any]]:
        parts, keeps = [], []
        for index, tile in enumerate(tiles.split(x, factor_in)):
            part, keep = run(vae, tile, None if kept is None else kept[index])
            parts.append(part)
            keeps.append(jax.device_get(keep))
        height, width = x.shape[2] // factor_in, x.shape[3] // factor_in
        return tiles.blend(parts, height, width, factor_out), keeps

    return step


def _scan(run: Callable[[Array, Kept | None], tuple[Array, Kept]], x: Array, size: int) -> Array:
    """Frame 0, a scan over as many blocks of `size` frames as there are, and what is left."""
    first, kept = run(x[:, :1], None)
    count = (x.shape[1] - 1) // size
    done = [first]
    if count:
        b, _, *rest = x.shape
        blocks = x[:, 1 : 1 + count * size].reshape(b, count, size, *rest).swapaxes(0, 1)

        def body(kept: Kept, block: Array) -> tuple[Kept, Array]:
            out, kept = run(block, kept)
            return kept, out

        kept, out = jax.lax.scan(body, kept, blocks)
        done.append(out.swapaxes(0, 1).reshape(b, -1, *out.shape[3:]))
    if x.shape[1] > 1 + count * size:
        done.append(run(x[:, 1 + count * size :], kept)[0])
    return jnp.concatenate(done, axis=1)


def _blocks(frames: Iterable[np.ndarray], size: int, factor: int) -> Iterator[np.ndarray]:
    """`b t h w 3`: frame 0, then `size` frames at a time; the end is filled to a multiple of `factor`."""
    waiting: list[np.ndarray] = []
    wanted = 1
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        shape = frame.shape if shape is None else shape
        if frame.shape != shape:
            raise UserError(f"frame {index} is {list(frame.shape)}, those before it {list(shape)}")
        if not np.isfinite(frame).all():
            raise UserError(f"frame {index} has pixels that are not finite")
        waiting.append(frame)
        if len(waiting) == wanted:
            yield np.stack(waiting, axis=1)
            waiting, wanted = [], size
    if waiting:
        waiting += [waiting[-1]] * (-len(waiting) % factor)
        yield np.stack(waiting, axis=1)


def _first_alone(latents: Iterable[Latents]) -> Iterator[Latents]:
    """The same latents with the first frame in a block of its own."""
    blocks = iter(latents)
    for first in blocks:
        yield first[:, :1]
        if first.shape[1] > 1:
            yield first[:, 1:]
        break
    yield from blocks
