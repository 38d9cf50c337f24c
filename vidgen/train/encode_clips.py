"""Encodes the clips of an experiment to latents, once for all of its training."""

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
"""Batches to prefetch."""


def choose_clips(data: BucketedData, num_clips: int | None) -> list[tuple[Bucket, ClipSource, np.ndarray]]:
    """Clips to encode, by bucket; data without buckets is one bucket of its own size.

    Args:
      num_clips: total over all buckets, divided in the proportions of training: weight times batch size.
        Clips of a bucket are drawn without replacement, always the same ones. None takes every clip of every
        bucket.

    Returns:
      Each bucket with its clip source and the sorted indices of the chosen clips.

    Raises:
      UserError: a bucket has fewer clips than its share, or its share is 0.
    """
    sizes = training_sizes(data, 1)
    sources = data.bucket_sources() if data.buckets else (data.source(),)
    shares = np.array([size.weight * (size.batch_size or 1) for size in sizes])
    chosen = []
    for number, (size, source) in enumerate(zip(sizes, sources, strict=True)):
        if num_clips is None:
            indices = np.arange(len(source))
        else:
            # Rounded so that the counts add up to `num_clips`.
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
    """Yields mean latents of clips, bucket by bucket: each size is compiled once.

    Args:
      chosen: as returned by `choose_clips`.
      batch_size: clips per batch, sharded over `mesh`; rounded up to a multiple of the `data` and `fsdp`
        devices.
      broken: receives the name of each clip that cannot be decoded, with the reason; such clips are skipped.
      num_threads: threads that decode clips.
    """
    vae = jax.device_put(vae, shardings(vae, mesh))
    num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    padded_size = -(-batch_size // num_shards) * num_shards
    for _, source, indices in chosen:
        for clips in _batches(source, indices, padded_size, num_threads, broken):
            videos = [clip["video"] for clip in clips]
            # The last batch repeats a clip, so that all batches have one shape.
            padded = np.stack(videos + videos[-1:] * (padded_size - len(videos)))
            with jax.set_mesh(mesh):
                latents = np.asarray(_encode(vae, processes.global_batch({"video": padded}, mesh)["video"]))
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
    source: ClipSource, indices: np.ndarray, batch_size: int, num_threads: int, broken: dict[str, str]
) -> Iterator[list[dict]]:
    """Batches of clips in order, prefetched in threads, without the broken ones."""

    def read(index: int) -> dict | BrokenClip:
        try:
            return source[index]
        except BrokenClip as error:
            return error

    reads = grain.MapDataset.source(indices.tolist()).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_READ_AHEAD * batch_size)
    batch: list[dict] = []
    for clip in reads.to_iter_dataset(options):
        if isinstance(clip, BrokenClip):
            broken[clip.name] = clip.reason
            continue
        batch.append(clip)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@jax.jit
def _encode(vae: VideoVAE, video: UInt8[Array, "b t h w 3"]) -> Latents:
    """Mean latents, replicated on every device."""
    return constrain(vae.encode(pixels.to_float(video)), *(None,) * 5)
