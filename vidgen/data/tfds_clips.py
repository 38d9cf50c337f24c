"""Clips from ArrayRecord files that a TFDS builder wrote; no TensorFlow needed."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import parse_json, require_text
from vidgen.core.typing import RGBClip
from vidgen.data.buckets import Bucket, with_size
from vidgen.data.decoding import broken_clips
from vidgen.data.source import BrokenClip
from vidgen.data.tfds_folder import open_records
from vidgen.data.video_reader import read_clip
from vidgen.data.video_writer import write_mp4

__all__ = [
    "ArrayRecordData",
    "ArrayRecordSource",
    "Encoding",
    "decode_record",
    "encode_record",
]

Encoding = Literal["lossless", "h264"]
"""How a clip's frames are kept: `lossless` is H.264 in RGB, every pixel as it was; `h264` is H.264 in 4:4:4
with crf 17, many times smaller for camera footage and without visible loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordData:
    """Clips written by `vidgen data build`.

    Attributes:
      kind: picks this kind of data in a config.
      path: what was given to the builder as `--out`, or the folder with `dataset_info.json` in it.
      split: name of the split, `train` or `heldout`.
      num_frames: frames of a clip, from its beginning.
      height: pixels; what is stored in another size is resized and cropped.
      width: pixels.
      buckets: sizes of training clips, each for all of the clips, which are of one size as they are stored;
        empty for `num_frames`, `height` and `width` alone, which otherwise are the size of previews.
      fps: frames per second; what is stored at another rate is resampled.

    Raises:
      UserError: a number is not possible.
    """

    kind: Literal["array_record"] = "array_record"
    path: str
    split: str = "train"
    num_frames: Annotated[int, limits.NUM_FRAMES] = 17
    height: Annotated[int, limits.SIDE] = 64
    width: Annotated[int, limits.SIDE] = 64
    buckets: tuple[Bucket, ...] = ()
    fps: Annotated[float, limits.FPS] = 8.0

    def __post_init__(self):
        limits.check_fields(self, "array_record")

    def source(self) -> "ArrayRecordSource":
        """The clips.

        Raises:
          FileNotFoundError: there are no records at `path`.
          UserError: their JSON is damaged; there is no such split, it is empty, or its clips are too short.
        """
        records = open_records(pathlib.Path(self.path), self.split)
        if len(records) == 0:
            raise UserError(f'{self.path}: the split "{self.split}" has no clips.')
        source = ArrayRecordSource(self, records)
        try:
            source[0]
        except BrokenClip as error:
            raise UserError(f"{self.path}: the first clip cannot be read as asked: {error}") from error
        return source

    def bucket_sources(self) -> tuple["ArrayRecordSource", ...]:
        """The clips, as each bucket takes them.

        Raises:
          FileNotFoundError: there are no records at `path`.
          UserError: the clips are too short for a bucket, which the message names.
        """
        sources = []
        for number, bucket in enumerate(self.buckets):
            try:
                sources.append(with_size(self, bucket).source())
            except ValueError as error:
                raise UserError(f"bucket {number} ({bucket}): {error}") from error
        return tuple(sources)


class ArrayRecordSource:
    """Clips of one split, in the order in which they were written."""

    def __init__(self, options: ArrayRecordData, records: Sequence[Mapping[str, Any]]):
        self.options = options
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"ArrayRecordSource({self.options.path!r}, {self.options.split!r}, {len(self)} clips)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip: `video` uint8 [t h w 3], `caption`, `name`, and what else the written source gave.

        Raises:
          BrokenClip: it cannot be decoded, or is shorter than `num_frames`.
          IndexError: there is no clip of that index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.options.path}: clip {index} of {len(self)}.")
        options = self.options
        with broken_clips(f"{options.path}, {options.split}, record {index}", "its record is damaged"):
            record = self._records[index]
        return decode_record(
            record,
            num_frames=options.num_frames,
            fps=options.fps,
            height=options.height,
            width=options.width,
        )


def encode_record(example: Mapping[str, Any], *, fps: float, encoding: Encoding) -> dict[str, bytes | str]:
    """One clip of a source as the texts of a record.

    The extra entries of the clip go into `metadata`, JSON that also has the clip's fps and size.

    Args:
      example: a clip as a `ClipSource` gives it.
      fps: its frames per second.
      encoding: how the frames are kept.
    """
    video: RGBClip = example["video"]
    buffer = io.BytesIO()
    if encoding == "lossless":
        write_mp4(buffer, video, fps=fps, crf=0, pix_fmt="rgb24")
    else:
        write_mp4(buffer, video, fps=fps, pix_fmt="yuv444p")
    extras = {key: value for key, value in example.items() if key not in ("video", "caption", "name")}
    num_frames, height, width, _ = video.shape
    metadata = {
        "fps": fps,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "encoding": encoding,
        "extras": {key: _to_json(key, value) for key, value in extras.items()},
    }
    return {
        "clip": buffer.getvalue(),
        "caption": example["caption"],
        "name": example["name"],
        "metadata": json.dumps(metadata),
    }


def decode_record(
    record: Mapping[str, Any],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """A clip, as `encode_record` was given it, from the bytes of its record; the rest as in `read_clip`.

    Raises:
      BrokenClip: the clip cannot be decoded.
    """
    with broken_clips(str(record.get("name", "record"))[:80], "its record is damaged"):
        name, caption = _text(record["name"]), require_text(_text(record["caption"]), "its caption")
        metadata = parse_json(_text(record["metadata"]), "its metadata")
        extras = {key: _from_json(value) for key, value in metadata["extras"].items()}
    try:
        video = read_clip(
            io.BytesIO(record["clip"]), num_frames=num_frames, fps=fps, height=height, width=width
        )
    except BrokenClip as error:
        raise BrokenClip(name, error.reason) from error
    return {"video": video, "caption": caption, "name": name, **extras}


def _to_json(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"dtype": str(value.dtype), "shape": list(value.shape), "data": value.ravel().tolist()}
    raise UserError(
        f"cannot store {key!r} of a clip: {type(value).__name__}; use a text or an array of numbers."
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return np.array(value["data"], dtype=value["dtype"]).reshape(value["shape"])


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
