"""Clips from a folder of videos and images."""

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.data.buckets import Bucket, fitting_sizes, with_size
from vidgen.data.captions import FolderCaptions
from vidgen.data.folder_files import FolderFiles, FoundFile
from vidgen.data.training_data import VideoData
from vidgen.data.video_io import VideoInfo, read_clip

__all__ = ["FolderData", "FolderReport", "FolderSource", "UsedFile"]

_LISTED = 5
"""Number of rejected files that a message names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedFile:
    """A file that supplies clips.

    Attributes:
      path: path of the file.
      name: path relative to the folder, with forward slashes.
      info: metadata of the file.
      caption: caption of all its clips; empty if there is none.
      starts: start of each clip, in seconds.
    """

    path: pathlib.Path
    name: str
    info: VideoInfo
    caption: str
    starts: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderReport:
    """Used and rejected files of a folder.

    Attributes:
      used: files that supply clips, sorted by name.
      rejected: all other files, as (name, reason).
    """

    used: tuple[UsedFile, ...]
    rejected: tuple[tuple[str, str], ...]

    @property
    def num_clips(self) -> int:
        """Number of clips over all files."""
        return sum(len(file.starts) for file in self.used)

    @property
    def without_caption(self) -> tuple[str, ...]:
        """Names of the used files that have no caption."""
        return tuple(file.name for file in self.used if not file.caption)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderData(VideoData):
    """A folder of videos (any container that FFmpeg opens) and, with `num_frames=1`, images.

    Subfolders are included; names that begin with a dot are not. A video supplies a clip at every multiple of
    `stride` from which a complete clip fits. Frames are resampled to `fps`, resized at constant aspect ratio,
    and cropped.

    The last second of every `heldout_every` seconds of a video is held out. A clip that overlaps such a
    second belongs to `heldout`, every other clip to `train`, so no training clip shows a frame of a held-out
    second. That holds out about (clip length + 1 s) / `heldout_every` of the clips. Of the images, and of the
    videos shorter than `heldout_every` seconds, one in `heldout_every` is held out entirely, chosen by a hash
    of the name.

    With `buckets`, training takes clips of several sizes. Images go to buckets of one frame, videos to the
    buckets that they are long enough for. Among buckets with the same number of frames, a file goes to those
    nearest to its aspect ratio (by the share that cropping keeps, give or take 5 %) that do not enlarge it;
    if all do, to the one that enlarges it least.

    Attributes:
      kind: selects this kind of data in a config.
      path: the folder.
      num_frames: frames of a clip; with `buckets`, `num_frames`, `height` and `width` are the size of
        held-out clips and previews.
      height: pixels.
      width: pixels.
      fps: frames per second of the clips.
      stride: seconds between the starts of consecutive clips of a video; None places clips end to end.
      captions: path of a list of captions (`.jsonl` or `.csv`); None looks for `captions.jsonl` and
        `captions.csv` in the folder. A file that is not in a list takes its caption from the `.txt` beside
        it.
      require_captions: whether files without a caption are left out; otherwise their caption is empty.
      split: `train`, `heldout`, or `all` for both.
      heldout_every: period of held-out seconds; must leave room for a clip.
      buckets: sizes of training clips; empty uses only `num_frames`, `height` and `width`.
      images_from_videos: whether videos also supply clips of one frame.
      crop: `center`, or `random`: a position drawn once for each clip.
      flip: whether half of the clips, always the same, are mirrored. Beware of captions with "left" or
        "right".
      seed: seed of random crops and flips.

    Raises:
      UserError: a number is out of range.
    """

    kind: Literal["folder"] = "folder"
    path: str
    num_frames: Annotated[int, limits.NUM_FRAMES] = 17
    height: Annotated[int, limits.SIDE] = 64
    width: Annotated[int, limits.SIDE] = 64
    fps: Annotated[float, limits.FPS] = 8.0
    stride: Annotated[float, limits.SECONDS] | None = None
    captions: str | None = None
    require_captions: bool = False
    split: Literal["train", "heldout", "all"] = "all"
    heldout_every: Annotated[int, limits.HELDOUT_EVERY] = 20
    buckets: tuple[Bucket, ...] = ()
    images_from_videos: bool = True
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    seed: Annotated[int, limits.SEED] = 0

    def __post_init__(self):
        limits.check_fields(self, "folder")

    @property
    def clip_seconds(self) -> float:
        """Duration of a clip in seconds."""
        return self.num_frames / self.fps

    def scan(self) -> FolderReport:
        """Reports which files of the folder are used; decodes one frame of each.

        Raises:
          NotADirectoryError: the folder does not exist.
          UserError: a list of captions cannot be read.
        """
        files = FolderFiles.look(pathlib.Path(self.path), self.captions)
        return self._report(files)

    def scan_buckets(self) -> tuple[FolderReport, ...]:
        """Same as `scan`, for each bucket; a file that suits another bucket better is rejected.

        Raises:
          NotADirectoryError: the folder does not exist.
          UserError: a list of captions cannot be read.
        """
        files = FolderFiles.look(pathlib.Path(self.path), self.captions)
        datas = self._bucket_options()
        suited = {file.name: _suited(file, datas) for file in files.found}
        return tuple(
            data._report(files, {name for name, numbers in suited.items() if number not in numbers})
            for number, data in enumerate(datas)
        )

    def source(self) -> "FolderSource":
        """Opens the clips; logs the rejected files.

        Raises:
          UserError: no file can be used; the message gives the reasons.
        """
        report = self.scan()
        self._require(report)
        self._log([report])
        return FolderSource(self, report.used)

    def bucket_sources(self) -> tuple["FolderSource", ...]:
        """Opens the clips of each bucket; logs files that no bucket uses.

        Raises:
          UserError: no file can be used for a bucket; the message names the bucket and the reasons.
        """
        reports, datas = self.scan_buckets(), self._bucket_options()
        for number, (data, report) in enumerate(zip(datas, reports, strict=True)):
            data._require(report, f"bucket {number} ({self.buckets[number]}): ")
        self._log(reports)
        return tuple(FolderSource(data, report.used) for data, report in zip(datas, reports, strict=True))

    def heldout(self) -> "FolderData":
        return dataclasses.replace(self, split="heldout") if self.split == "train" else self

    def _bucket_options(self) -> tuple["FolderData", ...]:
        """Copies of the options, each with the clip size of one bucket."""
        return tuple(with_size(self, bucket) for bucket in self.buckets)

    def _report(self, files: FolderFiles, elsewhere: set[str] | frozenset[str] = frozenset()) -> FolderReport:
        """Used and rejected files; those named in `elsewhere` suit another bucket better."""
        used: list[UsedFile] = []
        rejected = list(files.stray)
        for found in files.found:
            file = self._judge(found, files.captions)
            if isinstance(file, UsedFile) and found.name in elsewhere:
                file = "suits another bucket better"
            if isinstance(file, str):
                rejected.append((found.name, file))
            else:
                used.append(file)
        return FolderReport(used=tuple(used), rejected=tuple(sorted(rejected)))

    def _require(self, report: FolderReport, where: str = "") -> None:
        if not report.used:
            raise UserError(
                f"{self.path}: {where}no clip of {self.num_frames} frames at {self.fps:g} fps can be used "
                f'for "{self.split}" (heldout_every={self.heldout_every}): '
                f"{_some(report.rejected) or 'the folder is empty'}. `vidgen data check` lists every file."
            )

    def _log(self, reports: Sequence[FolderReport]) -> None:
        """Logs the used files, and the files that all reports reject."""
        log = get_logger(__name__)
        used = {file.name: file for report in reports for file in report.used}
        rejected = {name: why for report in reports for name, why in report.rejected if name not in used}
        clips = sum(report.num_clips for report in reports)
        log.info("%s: %d clips of %d files", self.path, clips, len(used))
        if len(reports) > 1:
            for bucket, report in zip(self.buckets, reports, strict=True):
                log.info("bucket %s: %d clips of %d files", bucket, report.num_clips, len(report.used))
        if rejected:
            log.warning(
                "%s: %d files are not used: %s", self.path, len(rejected), _some(tuple(rejected.items()))
            )
        if without := [name for name, file in used.items() if not file.caption]:
            log.warning("%s: %d files have no caption", self.path, len(without))

    def _judge(self, file: FoundFile, captions: FolderCaptions) -> UsedFile | str:
        """The file with its clips, or the reason why it is rejected."""
        info = file.info
        if isinstance(info, str):
            return info
        if info.is_image and self.num_frames > 1:
            return f"an image is one frame, {self.num_frames} are wanted"
        if not info.is_image and self.num_frames == 1 and not self.images_from_videos:
            return "a video, and images_from_videos is off"
        fitting = self._starts(info)
        if not fitting:
            return (
                f"too short: {info.duration:.2f} s, a clip of {self.num_frames} frames at {self.fps:g} fps "
                f"takes {self.clip_seconds:.2f} s"
            )
        starts = tuple(start for start in fitting if self._in_split(file.name, info, start))
        if not starts:
            return f'none of its {len(fitting)} clips belongs to "{self.split}"'
        try:
            caption = captions.of(file.path)
        except (UserError, OSError) as error:
            return f"its caption cannot be read: {error}"
        if self.require_captions and not caption:
            return "no caption"
        return UsedFile(path=file.path, name=file.name, info=info, caption=caption, starts=starts)

    def _starts(self, info: VideoInfo) -> list[float]:
        if info.is_image:
            return [0.0]
        stride = self.clip_seconds if self.stride is None else self.stride
        # Half a frame of slack: the last frame of the clip is still on screen at its time.
        room = info.duration + 0.5 / self.fps - self.clip_seconds
        if room < 0:
            return [0.0] if self.num_frames == 1 else []  # every video has a first frame
        return [index * stride for index in range(int(room / stride + 1e-6) + 1)]

    def _in_split(self, name: str, info: VideoInfo, start: float) -> bool:
        if self.split == "all":
            return True
        if info.duration < self.heldout_every:
            heldout = _stable_hash(name) % self.heldout_every == 0
        else:
            end = start + self.clip_seconds
            seconds = range(math.floor(start + 1e-6), math.ceil(end - 1e-6))
            heldout = any(second % self.heldout_every == self.heldout_every - 1 for second in seconds)
        return heldout == (self.split == "heldout")


class FolderSource:
    """Clips of a folder's files, in the order of their names and starts."""

    def __init__(self, options: FolderData, files: tuple[UsedFile, ...]):
        self.options = options
        self.files = files
        self._clips = [(file, start) for file in files for start in file.starts]

    def __len__(self) -> int:
        return len(self._clips)

    def __repr__(self) -> str:
        return f"FolderSource({self.options.path!r}, {len(self)} clips)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one clip: `video` uint8 [t h w 3], `caption`, and `name`, which contains file and start.

        Raises:
          BrokenClip: the file cannot be decoded at the clip.
          IndexError: the index is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.options.path}: clip {index} of {len(self)}.")
        file, start = self._clips[index]
        options = self.options
        rng = np.random.default_rng((options.seed, int(index)))
        down, right, mirror = rng.random(3)
        video = read_clip(
            file.path,
            start=start,
            num_frames=options.num_frames,
            fps=options.fps,
            height=options.height,
            width=options.width,
            crop_at=(down, right) if options.crop == "random" else (0.5, 0.5),
        )
        if options.flip and mirror < 0.5:
            video = np.ascontiguousarray(video[:, :, ::-1])
        name = file.name if file.info.is_image else f"{file.name}@{start:.3f}s"
        return {"video": video, "caption": file.caption, "name": name}


def _suited(file: FoundFile, datas: Sequence[FolderData]) -> set[int]:
    """Indices of the buckets that suit a file's shape; all of them if the file cannot be read."""
    info = file.info
    if isinstance(info, str):
        return set(range(len(datas)))
    shown = (info.height, info.width * info.pixel_aspect)
    chosen: set[int] = set()
    for frames in {data.num_frames for data in datas}:
        same = [number for number, data in enumerate(datas) if data.num_frames == frames]
        sizes = [(datas[number].height, datas[number].width) for number in same]
        chosen |= {same[index] for index in fitting_sizes(shown, sizes)}
    return chosen


def _some(rejected: Sequence[tuple[str, str]]) -> str:
    """The first few rejected files with their reasons, as text."""
    reasons = [f"{name}: {why}" for name, why in rejected[:_LISTED]]
    return "; ".join([*reasons, "..."] if len(rejected) > _LISTED else reasons)


def _stable_hash(text: str) -> int:
    return zlib.crc32(text.encode())
