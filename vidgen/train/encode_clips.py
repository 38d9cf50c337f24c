"""The clips of an experiment as latents, computed once for all of its training."""

from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Latents, UInt8
from vidgen.data.buckets import Bucket, BucketedData, training_sizes
from vidgen.data.latents_records import LatentClip
from vidgen.data.source import BrokenClip, ClipSource
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel import processes
from vidgen.parallel.rules import constrain, shardings

__all__ = ["choose_clips", "encode_clips"]

_READ_AHEAD = 4
"""Batches."""


def choose_clips(data: BucketedData, num_clips: int | None) -> list[tuple[Bucket, ClipSource, np.ndarray]]:
    """Which clips of each bucket to take; the data's own size is the one bucket where it has none.

    Args:
      num_clips: over all buckets, shared as training would draw them: by weight times batch size. Of each
        bucket they are drawn without repetition, always the same ones. None is every clip of every bucket.

    Returns:
      Each bucket with its clips and the indices of those to take, in order.

    Raises:
      UserError: a bucket has fewer clips than its share, or no share at all.
    """
    sizes = training_sizes(data, 1)
    sources = data.bucket_sources() if data.buckets else (data.source(),)
    shares = np.array([size.weight * (size.batch_size or 1) for size in sizes])
    chosen = []
    for number, (size, source) in enumerate(zip(sizes, sources, strict=True)):
        if num_clips is None:
            indices = np.arange(len(source))
        else:
            # Rounded so that they add up to `num_clips`.
            ends = np.rint(num_clips * np.concatenate([[0.0], shares.cumsum()]) / shares.sum()).astype(int)
            count = int(np.diff(ends)[number])
            if not 0 < count <= len(source):
                raise UserError(
                    f"{num_clips} clips are {count} of the size {size}, of which there are {len(source)}: "
                    f"take {'more' if count < 1 else 'fewer'}, or change the weights of the buckets"
                )
            generator = np.random.default_rng((number, len(source)))
            indices = np.sort(generator.choice(len(source), count, replace=False))
        chosen.append((size, source, indices))
    return chosen


def encode_clips(
    vae: VideoVAE,
    chosen: Sequence[tuple[Bucket, ClipSource, np.ndarray]],
    *,
    batch_size: int,
    mesh: Mesh,
    broken: dict[str, str],
    num_threads: int = 4,
) -> Iterator[LatentClip]:
    """Mean latents of clips, bucket by bucket: each size is compiled once.

    Args:
      chosen: as `choose_clips` gives them.
      batch_size: clips at a time, cut over `mesh`; rounded up to what its devices can share.
      broken: clips that cannot be decoded are left out, and their reasons put here by name.
      num_threads: that decode clips.
    """
    vae = jax.device_put(vae, shardings(vae, mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-batch_size // ways) * ways
    for _, source, indices in chosen:
        for clips in _batches(source, indices, rows, num_threads, broken):
            videos = [clip["video"] for clip in clips]
            # What the last batch lacks is filled, so that it has the others' shape.
            filled = np.stack(videos + videos[-1:] * (rows - len(videos)))
            with jax.set_mesh(mesh):
                latents = np.asarray(_encode(vae, processes.global_batch({"video": filled}, mesh)["video"]))
            for clip, encoded in zip(clips, latents, strict=False):
                num_frames, height, width, _ = clip["video"].shape
                yield LatentClip(
                    latents=encoded,
                    caption=clip["caption"],
                    name=clip["name"],
                    num_frames=num_frames,
                    height=height,
                    width=width,
                )


def _batches(
    source: ClipSource, indices: np.ndarray, rows: int, num_threads: int, broken: dict[str, str]
) -> Iterator[list[dict]]:
    """Clips in order, read ahead in threads, without the broken ones."""

    def read(index: int) -> dict | BrokenClip:
        try:
            return source[index]
        except BrokenClip as error:
            return error

    reads = grain.MapDataset.source(indices.tolist()).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_READ_AHEAD * rows)
    batch: list[dict] = []
    for clip in reads.to_iter_dataset(options):
        if isinstance(clip, BrokenClip):
            broken[clip.name] = clip.reason
            continue
        batch.append(clip)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch


@jax.jit
def _encode(vae: VideoVAE, video: UInt8[Array, "b t h w 3"]) -> Latents:
    """Whole on every device."""
    return constrain(vae.encode(pixels.to_float(video)), *(None,) * 5)
