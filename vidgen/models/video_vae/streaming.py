"""Encodes and decodes videos of any length chunk by chunk: memory does not grow with the duration.

Frame 0 is the first chunk; each later chunk is `group` latent frames. Results equal those of the full video
at once, because each chunk gets the cached frames of the previous one.

With a mesh in context (`jax.set_mesh`), frames are sharded: width over `context` and height over `tensor`,
where these divide the latents' width and height; results are the same. `tiles` are for a device without
memory for full frames; results differ slightly.
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

Carry = tuple[Array, ...]
"""Frames carried from one chunk to the next: `CausalCache.new_frames`, one array per causal layer."""


def encode(vae: VideoVAE, video: Video, *, group: int = 1, tiles: Tiles | None = None) -> Latents:
    """`vae.encode` as a scan over chunks of frames.

    Args:
      video: pixels in [-1, 1]; 1 + n * temporal_factor frames.
      group: latent frames per chunk.
      tiles: split frames into tiles, and encode all frames of one tile after another.
    """
    step, size = functools.partial(_encode_chunk, vae), vae.config.temporal_factor * group
    return _per_tile(lambda x: _scan(step, x, size), video, tiles, *_factors(vae, encoding=True))


def decode(
    vae: VideoVAE,
    latents: Latents,
    *,
    group: int = 1,
    tiles: Tiles | None = None,
    emit: Callable[[Video], Array] = lambda video: video,
) -> Array:
    """`vae.decode` as a scan over chunks of latent frames.

    Args:
      group: latent frames per chunk.
      tiles: split frames into tiles, and decode all frames of one tile after another; blended before `emit`.
      emit: applied to each chunk's frames, for a smaller result (`vidgen.core.pixels.to_uint8`).

    Returns:
      `emit` of the frames `b t h w 3`, which are in [-1, 1] and not clipped.
    """
    step = functools.partial(_decode_chunk, vae)
    if tiles is not None:
        return emit(
            _per_tile(lambda x: _scan(step, x, group), latents, tiles, *_factors(vae, encoding=False))
        )

    def decode_and_emit(x: Array, carry: Carry | None) -> tuple[Array, Carry]:
        frames, carry = step(x, carry)
        return emit(frames), carry

    return _scan(decode_and_emit, latents, group)


def encode_stream(
    vae: VideoVAE, frames: Iterable[np.ndarray], *, group: int = 1, tiles: Tiles | None = None
) -> Iterator[Latents]:
    """Encodes a video that arrives frame by frame; yields latents as soon as a chunk is complete.

    Args:
      frames: any number of frames, each `b h w 3` in [-1, 1]. An incomplete last latent frame is filled by
        repeating the last frame; pass the number of frames to `decode_stream` to crop it again.
      group: latent frames per chunk.
      tiles: split frames into tiles that are on the device one at a time; carries of the others are on the
        host.

    Yields:
      Normalised latents `b t h w c`: one latent frame for frame 0, then `group` at a time.

    Raises:
      UserError: a frame differs from the first in size, or has pixels that are not finite; names the frame.
    """
    step = _step(_jit_encode_chunk, vae, tiles, *_factors(vae, encoding=True))
    carry = None
    size = vae.config.temporal_factor * group
    for chunk in _chunks(frames, size, vae.config.temporal_factor):
        latents, carry = step(jnp.asarray(chunk), carry)
        yield latents


def decode_stream(
    vae: VideoVAE,
    latents: Iterable[Latents],
    *,
    num_frames: int | None = None,
    tiles: Tiles | None = None,
) -> Iterator[Video]:
    """Decodes a video chunk by chunk; yields the frames of each chunk before the next is computed.

    Args:
      latents: chunks `b t h w c` of any length, as `encode_stream` yields.
      num_frames: total number of frames to yield; None is all.
      tiles: split frames into tiles that are on the device one at a time; carries of the others are on the
        host.

    Yields:
      Frames `b t h w 3` in [-1, 1], float32, not clipped.
    """
    step = _step(_jit_decode_chunk, vae, tiles, *_factors(vae, encoding=False))
    carry = None
    remaining = num_frames
    for chunk in _first_alone(latents):
        if remaining is not None and remaining <= 0:
            return
        frames, carry = step(chunk, carry)
        if remaining is not None:
            frames, remaining = frames[:, :remaining], remaining - frames.shape[1]
        yield frames


def padded_frames(num_frames: int, temporal_factor: int) -> int:
    """Smallest 1 + n * temporal_factor that is at least `num_frames`."""
    return num_frames + (1 - num_frames) % temporal_factor


def fill_sides(frame: UInt8[np.ndarray, "h w 3"], spatial_factor: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pads a frame to multiples of `spatial_factor` by repeating its last row and column of pixels."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, -height % spatial_factor), (0, -width % spatial_factor), (0, 0)), mode="edge")


def _encode_chunk(vae: VideoVAE, video: Video, carry: Carry | None) -> tuple[Latents, Carry]:
    cache = CausalCache(carry)
    latents = vae.encode(video, cache)
    return latents, tuple(cache.new_frames)


def _decode_chunk(vae: VideoVAE, latents: Latents, carry: Carry | None) -> tuple[Video, Carry]:
    cache = CausalCache(carry)
    video = vae.decode(latents, cache)
    return video, tuple(cache.new_frames)


_jit_encode_chunk = jax.jit(_encode_chunk, donate_argnames="carry")
_jit_decode_chunk = jax.jit(_decode_chunk, donate_argnames="carry")


def _factors(vae: VideoVAE, *, encoding: bool) -> tuple[int, int]:
    """Pixels per latent pixel of the input and of the output, along height and width."""
    return (vae.config.spatial_factor, 1) if encoding else (1, vae.config.spatial_factor)


def _per_tile(
    run: Callable[[Array], Array], x: Array, tiles: Tiles | None, factor_in: int, factor_out: int
) -> Array:
    if tiles is None:
        return run(x)
    parts = jax.lax.map(run, jnp.stack(tiles.split(x, factor_in)))
    return tiles.blend(list(parts), x.shape[2] // factor_in, x.shape[3] // factor_in, factor_out)


def _step(
    run: Callable[..., tuple[Array, Carry]],
    vae: VideoVAE,
    tiles: Tiles | None,
    factor_in: int,
    factor_out: int,
) -> Callable[[Array, Any], tuple[Array, Any]]:
    """Step function (chunk, carry) -> (output, carry); with `tiles` it runs tile by tile."""
    if tiles is None:
        return functools.partial(run, vae)

    def step(x: Array, carries: list[Any] | None) -> tuple[Array, list[Any]]:
        parts, new_carries = [], []
        for index, tile in enumerate(tiles.split(x, factor_in)):
            part, new_carry = run(vae, tile, None if carries is None else carries[index])
            parts.append(part)
            new_carries.append(jax.device_get(new_carry))
        height, width = x.shape[2] // factor_in, x.shape[3] // factor_in
        return tiles.blend(parts, height, width, factor_out), new_carries

    return step


def _scan(run: Callable[[Array, Carry | None], tuple[Array, Carry]], x: Array, size: int) -> Array:
    """Runs frame 0, scans over chunks of `size` frames, and runs the remaining frames."""
    first, carry = run(x[:, :1], None)
    count = (x.shape[1] - 1) // size
    done = [first]
    if count:
        b, _, *rest = x.shape
        chunks = x[:, 1 : 1 + count * size].reshape(b, count, size, *rest).swapaxes(0, 1)

        def body(carry: Carry, chunk: Array) -> tuple[Carry, Array]:
            out, carry = run(chunk, carry)
            return carry, out

        carry, out = jax.lax.scan(body, carry, chunks)
        done.append(out.swapaxes(0, 1).reshape(b, -1, *out.shape[3:]))
    if x.shape[1] > 1 + count * size:
        done.append(run(x[:, 1 + count * size :], carry)[0])
    return jnp.concatenate(done, axis=1)


def _chunks(frames: Iterable[np.ndarray], size: int, factor: int) -> Iterator[np.ndarray]:
    """Chunks `b t h w 3`: frame 0, then `size` frames each; pads the last to a multiple of `factor`."""
    pending: list[np.ndarray] = []
    wanted = 1
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        shape = frame.shape if shape is None else shape
        if frame.shape != shape:
            raise UserError(f"frame {index} is {list(frame.shape)}, those before it {list(shape)}")
        if not np.isfinite(frame).all():
            raise UserError(f"frame {index} has pixels that are not finite")
        pending.append(frame)
        if len(pending) == wanted:
            yield np.stack(pending, axis=1)
            pending, wanted = [], size
    if pending:
        pending += [pending[-1]] * (-len(pending) % factor)
        yield np.stack(pending, axis=1)


def _first_alone(latents: Iterable[Latents]) -> Iterator[Latents]:
    """The same chunks, with the first latent frame split into a separate chunk."""
    chunks = iter(latents)
    for first in chunks:
        yield first[:, :1]
        if first.shape[1] > 1:
            yield first[:, 1:]
        break
    yield from chunks
