"""Latents of many clips of any sizes, as a folder of ArrayRecord files with an index."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from safetensors.numpy import load, save

from vidgen.ckpt.json_files import write_json
from vidgen.core import limits
from vidgen.core.config import resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import parse_json, read_json, require_text
from vidgen.core.typing import Float
from vidgen.data.decoding import broken_clips
from vidgen.data.source import BrokenClip

__all__ = ["LatentClip", "LatentRecords", "RecordsInfo", "write_latent_records"]

_INDEX, _SIZES = "latents.json", "sizes.npy"
_SHARD_BYTES = 256 * 2**20
_REMEDY = "write the latents again with `vidgen data latents`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentClip:
    """Latents of one clip.

    Attributes:
      latents: [t h w c], normalised.
      num_frames: frames of the video.
      height: pixels of the video.
      width: pixels of the video.
    """

    latents: Float[np.ndarray, "t h w c"]
    caption: str
    name: str
    num_frames: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordsInfo:
    """Metadata of a folder of latents.

    Attributes:
      vae: the autoencoder's folder, as specified when the latents were written.
      encoder: fingerprint of the encoder (`vidgen.train.vae_folder.encoder_fingerprint`).
      channels: channels of the latents.
      spatial_factor: pixels per latent pixel, per side.
      temporal_factor: frames per latent frame, after the first.
      fps: frames per second of the videos.
      shards: number of clips in each file, in the order of the clips.
    """

    vae: str
    encoder: str
    channels: Annotated[int, limits.WIDTH]
    spatial_factor: Annotated[int, limits.FACTOR]
    temporal_factor: Annotated[int, limits.FACTOR]
    fps: Annotated[float, limits.FPS]
    shards: dict[str, Annotated[int, limits.COUNT]] = dataclasses.field(default_factory=dict)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video."""
        frames = 1 + (num_frames - 1) // self.temporal_factor
        return frames, height // self.spatial_factor, width // self.spatial_factor


def write_latent_records(out: pathlib.Path | str, clips: Iterable[LatentClip], info: RecordsInfo) -> int:
    """Writes clips to a folder that `LatentRecords(out)` reads; the folder is written atomically.

    Latents are stored as float16: near 1, the scale of normalised latents, it is eight times as precise as
    bfloat16.

    Args:
      out: output folder; must not exist. Remains of an interrupted call beside it are removed.
      info: metadata of the folder; `shards` is filled in.

    Returns:
      The number of clips.

    Raises:
      FileExistsError: `out` exists.
      UserError: there are no clips, or a clip's latents are not finite or exceed float16.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; remove it or choose another folder")
    unfinished = out.with_name(out.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        sizes, shards = _write_shards(unfinished, clips)
        if not sizes:
            raise UserError("there are no clips to write")
        np.save(unfinished / _SIZES, np.asarray(sizes, np.int32))
        write_json(unfinished / _INDEX, to_dict(dataclasses.replace(info, shards=shards)))
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return len(sizes)


def _write_shards(
    folder: pathlib.Path, clips: Iterable[LatentClip]
) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    sizes: list[tuple[int, int, int]] = []
    shards: dict[str, int] = {}
    writer, written = None, 0
    for clip in clips:
        record = _encode(clip)
        if writer is None or written + len(record) > _SHARD_BYTES:
            if writer is not None:
                writer.close()
            name = f"latents-{len(shards):05d}.array_record"
            # One record per chunk: damage to one leaves the others readable. Latents do not compress.
            writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
            shards[name], written = 0, 0
        writer.write(record)
        written += len(record)
        shards[next(reversed(shards))] += 1
        sizes.append((clip.num_frames, clip.height, clip.width))
    if writer is not None:
        writer.close()
    return sizes, shards


class LatentRecords:
    """Clips of a folder written by `write_latent_records`, in the order they were written."""

    def __init__(self, path: pathlib.Path | str):
        """Opens the folder.

        Raises:
          FileNotFoundError: `path` holds no latents, or a file is missing.
          UserError: the index does not match the files.
        """
        self._path = pathlib.Path(path)
        index = self._path / _INDEX
        values = read_json(index, remedy="give a folder that `vidgen data latents` wrote")
        self.info: RecordsInfo = resolve(RecordsInfo, values, where=str(index))
        for name in self.info.shards:
            if pathlib.PurePath(name).name != name or name in ("", ".", ".."):
                raise UserError(f"{index}: shard {name!r} is not a file of this folder: {_REMEDY}")
        for name in (_SIZES, *self.info.shards):
            if not (self._path / name).exists():
                raise FileNotFoundError(f"{self._path / name} is missing: {_REMEDY}")
        try:
            sizes = np.load(self._path / _SIZES)
            shards = [str(self._path / name) for name in self.info.shards]
            self._records: Any = grain.sources.ArrayRecordDataSource(shards)
        except Exception as error:  # NumPy and ArrayRecord raise many types
            raise UserError(f"{self._path} is damaged ({error}): {_REMEDY}") from error
        expected = sum(self.info.shards.values())
        if (
            sizes.shape != (expected, 3)
            or sizes.dtype.kind != "i"
            or (sizes < 1).any()
            or len(self._records) != expected
        ):
            raise UserError(
                f"{self._path} is damaged: {index} speaks of {expected} clips, {_SIZES} of "
                f"{len(np.atleast_1d(sizes))}, and the files have {len(self._records)}: {_REMEDY}"
            )
        self._sizes: list[tuple[int, int, int]] = [(int(t), int(h), int(w)) for t, h, w in sizes]
        for number, size in enumerate(self._sizes):
            if min(self.info.latent_size(*size)) < 1:
                raise UserError(
                    f"{self._path / _SIZES}: clip {number} is of {size[0]} x {size[1]} x {size[2]}, which is "
                    f"less than one latent: {_REMEDY}"
                )

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width of each clip's video."""
        return self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __repr__(self) -> str:
        return f"LatentRecords({str(self._path)!r}, {len(self)} clips)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one clip: `latents` float16 [t h w c], `caption` and `name`.

        Raises:
          BrokenClip: the record is damaged; the error names its file and its number in that file.
          IndexError: the index is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path}: clip {index} of {len(self)}")
        with broken_clips(self._place(index), f"its record is damaged ({_REMEDY})"):
            clip = _decode(self._records[index])
        expected = (*self.info.latent_size(*self._sizes[index]), self.info.channels)
        found = clip["latents"].shape
        if found != expected:
            reason = f"its latents are {list(found)}, expected {list(expected)}; {_REMEDY}"
            raise BrokenClip(self._place(index), reason)
        return clip

    def _place(self, index: int) -> str:
        for name, count in self.info.shards.items():
            if index < count:
                return f"{self._path / name}, record {index}"
            index -= count
        raise AssertionError("unreachable: the shards' counts sum to the number of clips")


def _encode(clip: LatentClip) -> bytes:
    with np.errstate(over="ignore"):
        latents = np.ascontiguousarray(clip.latents, np.float16)
    if not np.isfinite(latents).all():
        largest = float(np.abs(clip.latents).max())
        raise UserError(
            f"{clip.name}: latents of up to {largest:g} are not finite as float16. The VAE cannot be used "
            "for this clip: check the clip and the VAE's weights"
        )
    about = json.dumps({"caption": clip.caption, "name": clip.name}).encode()
    return save({"latents": latents, "about": np.frombuffer(about, np.uint8)})


def _decode(record: bytes) -> dict[str, Any]:
    tensors: Mapping[str, np.ndarray] = load(record)
    about = parse_json(tensors["about"].tobytes(), "its caption and name")
    caption, name = (require_text(about[key], key) for key in ("caption", "name"))
    if tensors["latents"].dtype != np.float16:
        raise UserError(f"latents of type {tensors['latents'].dtype}, expected float16")
    return {"latents": tensors["latents"], "caption": caption, "name": name}
