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
from vidgen.data.video_io import VideoInfo, read_clip

__all__ = ["FolderData", "FolderReport", "FolderSource", "UsedFile"]

_LISTED = 5
"""How many files that are not used a log line names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedFile:
    """A file that gives clips.

    Attributes:
      path: where it is.
      name: its path below the folder, with forward slashes.
      info: what it holds.
      caption: of all its clips; empty where there is none.
      starts: seconds at which its clips begin.
    """

    path: pathlib.Path
    name: str
    info: VideoInfo
    caption: str
    starts: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What of a folder is used.

    Attributes:
      used: the files that give clips, sorted by name.
      rejected: the others, as (name, reason).
    """

    used: tuple[UsedFile, ...]
    rejected: tuple[tuple[str, str], ...]

    @property
    def num_clips(self) -> int:
        """Clips of all files."""
        return sum(len(file.starts) for file in self.used)

    @property
    def without_caption(self) -> tuple[str, ...]:
        """Names of the files in use that have no caption."""
        return tuple(file.name for file in self.used if not file.caption)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderData:
    """A folder of videos (any container that FFmpeg opens) or, with `num_frames=1`, of images too.

    Folders below it are searched as well; names that begin with a dot are not. A video gives a clip at every
    multiple of `stride` from which a whole clip fits. Frames are resampled to `fps`, resized with their
    aspect ratio kept, and cropped.

    Held out is the last second of every `heldout_every` seconds of a video. A clip that touches such a second
    belongs to `heldout`, every other one to `train`, so no training clip shows a frame of a held-out second.
    That holds out about (clip length + 1 s) / `heldout_every` of the clips. Images, and videos shorter than
    `heldout_every` seconds, are held out whole: one of every `heldout_every`, chosen by a hash of the name.

    With `buckets`, training takes clips of several sizes. Images go to buckets of one frame, videos to those
    that they are long enough for, and among the buckets with the same number of frames a file goes to those
    nearest to its aspect ratio (by what cropping leaves of it, give or take 5 %) for which it need not be
    enlarged; where there is none, to the one that enlarges it least.

    Attributes:
      kind: picks this kind of data in a config.
      path: the folder.
      num_frames: frames of a clip; with `buckets` this is the size of held-out clips and previews, as are
        `height` and `width`.
      height: pixels.
      width: pixels.
      fps: frames per second of the clips.
      stride: seconds between the starts of two clips of a video; None puts them end to end.
      captions: path of one list of captions (`.jsonl` or `.csv`); None takes `captions.jsonl` or
        `captions.csv` of the folder, if there is one. A file that is not in a list has its caption in the
        `.txt` beside it.
      require_captions: whether files without a caption are left out; otherwise their caption is empty.
      split: `train`, `heldout`, or `all` for both.
      heldout_every: seconds of which the last is held out; must leave room for a clip.
      buckets: sizes of training clips; empty for `num_frames`, `height` and `width` alone.
      images_from_videos: whether videos give clips of one frame too.
      crop: `center`, or `random`: the place drawn once for each clip.
      flip: whether half of the clips, always the same, are mirrored. Mind captions that say "left".
      seed: of random crops and flips.

    Raises:
      UserError: a number is not possible.
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
        """How long a clip is."""
        return self.num_frames / self.fps

    def scan(self) -> FolderReport:
        """Looks at every file of the folder, decoding one frame of each.

        Raises:
          NotADirectoryError: there is no such folder.
          UserError: a list of captions cannot be read.
        """
        files = FolderFiles.look(pathlib.Path(self.path), self.captions)
        return self._report(files)

    def scan_buckets(self) -> tuple[FolderReport, ...]:
        """As `scan`, for each bucket; a file that suits another bucket better is among the rejected ones.

        Raises:
          NotADirectoryError: there is no such folder.
          UserError: a list of captions cannot be read.
        """
        files = FolderFiles.look(pathlib.Path(self.path), self.captions)
        datas = self._of_buckets()
        suited = {file.name: _suited(file, datas) for file in files.found}
        return tuple(
            data._report(files, {name for name, numbers in suited.items() if number not in numbers})
            for number, data in enumerate(datas)
        )

    def source(self) -> "FolderSource":
        """The clips; what is not used is logged.

        Raises:
          UserError: nothing is left to use; the message gives the reasons.
        """
        report = self.scan()
        self._require(report)
        self._log([report])
        return FolderSource(self, report.used)

    def bucket_sources(self) -> tuple["FolderSource", ...]:
        """The clips of each bucket; files that none of them uses are logged.

        Raises:
          UserError: nothing is left to use for a bucket; the message names it and gives the reasons.
        """
        reports, datas = self.scan_buckets(), self._of_buckets()
        for number, (data, report) in enumerate(zip(datas, reports, strict=True)):
            data._require(report, f"bucket {number} ({self.buckets[number]}): ")
        self._log(reports)
        return tuple(FolderSource(data, report.used) for data, report in zip(datas, reports, strict=True))

    def _of_buckets(self) -> tuple["FolderData", ...]:
        """The options with the size of each bucket."""
        return tuple(with_size(self, bucket) for bucket in self.buckets)

    def _report(self, files: FolderFiles, elsewhere: set[str] | frozenset[str] = frozenset()) -> FolderReport:
        """What of the files is used; those named in `elsewhere` suit another size better."""
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
        """Says what is used of the folder, and what in none of the reports."""
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
        """The file as it is used, or the reason why it is not."""
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
        # Half a frame of slack: the last frame of the clip is then still on screen at its time.
        room = info.duration + 0.5 / self.fps - self.clip_seconds
        if room < 0:
            return [0.0] if self.num_frames == 1 else []  # every video shows its first frame
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
        """One clip: `video` uint8 [t h w 3], `caption`, and `name`, which gives the file and the start.

        Raises:
          BrokenClip: the file cannot be decoded there.
          IndexError: there is no clip of that index.
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
    """Which of several sizes a file is for."""
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
    """The first few of the files that are not used, with the reasons."""
    reasons = [f"{name}: {why}" for name, why in rejected[:_LISTED]]
    return "; ".join([*reasons, "..."] if len(rejected) > _LISTED else reasons)


def _stable_hash(text: str) -> int:
    return zlib.crc32(text.encode())
