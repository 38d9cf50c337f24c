"""Clips from the ArrayRecord files of a TFDS builder; needs no TensorFlow."""

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
from vidgen.data.training_data import VideoData
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
"""Encoding of stored frames: `lossless` is H.264 in RGB, exact in every pixel; `h264` is H.264 in 4:4:4 with
crf 17, visually lossless and, for camera footage, many times smaller."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordData(VideoData):
    """Clips written by `vidgen data build`.

    Attributes:
      kind: selects this kind of data in a config.
      path: output folder of the builder (its `--out`), or the folder that contains `dataset_info.json`.
      split: name of the split, `train` or `heldout`.
      num_frames: frames of a clip, from the start of the stored clip.
      height: pixels; clips stored at another size are resized and cropped.
      width: pixels.
      buckets: sizes of training clips. Every bucket uses all clips, which are stored at one size. If empty,
        training uses the size `num_frames`, `height` and `width`; otherwise that is the size of previews.
      fps: frames per second; clips stored at another rate are resampled.

    Raises:
      UserError: a number is out of range.
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
        """Opens the clips.

        Raises:
          FileNotFoundError: `path` holds no records.
          UserError: the JSON is damaged; the split does not exist or is empty, or its clips are too short.
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
        """Opens the clips at the size of each bucket.

        Raises:
          FileNotFoundError: `path` holds no records.
          UserError: the clips are too short for a bucket; the message names the bucket.
        """
        sources = []
        for number, bucket in enumerate(self.buckets):
            try:
                sources.append(with_size(self, bucket).source())
            except ValueError as error:
                raise UserError(f"bucket {number} ({bucket}): {error}") from error
        return tuple(sources)


class ArrayRecordSource:
    """Clips of one split, in the order they were written."""

    def __init__(self, options: ArrayRecordData, records: Sequence[Mapping[str, Any]]):
        self.options = options
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"ArrayRecordSource({self.options.path!r}, {self.options.split!r}, {len(self)} clips)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one clip: `video` uint8 [t h w 3], `caption`, `name`, and extra entries of the source.

        Raises:
          BrokenClip: the clip cannot be decoded, or is shorter than `num_frames`.
          IndexError: the index is out of range.
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
    """Encodes a clip as the fields of a record.

    Extra entries of the clip go into `metadata`, JSON that also holds the clip's fps and size.

    Args:
      example: a clip of a `ClipSource`.
      fps: frames per second of the clip.
      encoding: encoding of the frames.
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
    """Decodes a clip encoded by `encode_record`; the other arguments are those of `read_clip`.

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
