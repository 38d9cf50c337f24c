"""Clips from a folder of videos and images."""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import zlib
from typing import Any, Literal

import numpy as np

from vidgen.core.logging import get_logger
from vidgen.data.captions import CAPTION_SUFFIXES, FolderCaptions
from vidgen.data.source import BrokenClip
from vidgen.data.video_io import VideoInfo, probe, read_clip

__all__ = ["FolderData", "FolderReport", "FolderSource", "UsedFile", "clip_files"]

_PROBE_THREADS = 8
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

    Attributes:
      kind: picks this kind of data in a config.
      path: the folder.
      num_frames: frames of a clip.
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
      crop: `center`, or `random`: the place drawn once for each clip.
      flip: whether half of the clips, always the same, are mirrored. Mind captions that say "left".
      seed: of random crops and flips.

    Raises:
      ValueError: a number is not possible.
    """

    kind: Literal["folder"] = "folder"
    path: str
    num_frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0
    stride: float | None = None
    captions: str | None = None
    require_captions: bool = False
    split: Literal["train", "heldout", "all"] = "all"
    heldout_every: int = 20
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("num_frames", "height", "width", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"folder: {name} is {getattr(self, name)}; expected a positive number.")
        if self.stride is not None and self.stride <= 0:
            raise ValueError(f"folder: stride is {self.stride} s; expected a positive number.")
        if self.heldout_every < 2:
            raise ValueError(f"folder: heldout_every is {self.heldout_every} s; expected at least 2.")

    @property
    def clip_seconds(self) -> float:
        """How long a clip is."""
        return self.num_frames / self.fps

    def scan(self) -> FolderReport:
        """Looks at every file of the folder, decoding one frame of each.

        Raises:
          NotADirectoryError: there is no such folder.
          ValueError: a list of captions cannot be read.
        """
        root = pathlib.Path(self.path)
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder of videos.")
        clips = clip_files(root)
        texts = [file for file in _files_below(root) if file.suffix.lower() in CAPTION_SUFFIXES]
        captions = FolderCaptions.load(root, self.captions)
        used: list[UsedFile] = []
        rejected = [(_name(root, path), why) for path, why in captions.without_clip(clips, texts)]
        with concurrent.futures.ThreadPoolExecutor(_PROBE_THREADS) as pool:
            for path, found in zip(clips, pool.map(_probe, clips), strict=True):
                file = self._judge(path, _name(root, path), found, captions)
                if isinstance(file, str):
                    rejected.append((_name(root, path), file))
                else:
                    used.append(file)
        return FolderReport(used=tuple(used), rejected=tuple(sorted(rejected)))

    def source(self) -> "FolderSource":
        """The clips; what is not used is logged.

        Raises:
          ValueError: nothing is left to use; the message gives the reasons.
        """
        report = self.scan()
        log = get_logger(__name__)
        reasons = "; ".join(f"{name}: {why}" for name, why in report.rejected[:_LISTED])
        if len(report.rejected) > _LISTED:
            reasons += "; ..."
        if not report.used:
            raise ValueError(
                f"{self.path}: no clip of {self.num_frames} frames at {self.fps:g} fps can be used for "
                f'"{self.split}" (heldout_every={self.heldout_every}): {reasons or "the folder is empty"}. '
                "`vidgen data check` lists every file."
            )
        log.info("%s: %d clips of %d files", self.path, report.num_clips, len(report.used))
        if report.rejected:
            log.warning("%s: %d files are not used: %s", self.path, len(report.rejected), reasons)
        if report.without_caption:
            log.warning("%s: %d files have no caption", self.path, len(report.without_caption))
        return FolderSource(self, report.used)

    def _judge(
        self, path: pathlib.Path, name: str, found: VideoInfo | str, captions: FolderCaptions
    ) -> UsedFile | str:
        """The file as it is used, or the reason why it is not."""
        if isinstance(found, str):
            return found
        if found.is_image and self.num_frames > 1:
            return f"an image is one frame, {self.num_frames} are wanted"
        fitting = self._starts(found)
        if not fitting:
            return (
                f"too short: {found.duration:.2f} s, a clip of {self.num_frames} frames at {self.fps:g} fps "
                f"takes {self.clip_seconds:.2f} s"
            )
        starts = tuple(start for start in fitting if self._in_split(name, found, start))
        if not starts:
            return f'none of its {len(fitting)} clips belongs to "{self.split}"'
        try:
            caption = captions.of(path)
        except ValueError as error:
            return f"its caption cannot be read: {error}"
        if self.require_captions and not caption:
            return "no caption"
        return UsedFile(path=path, name=name, info=found, caption=caption, starts=starts)

    def _starts(self, info: VideoInfo) -> list[float]:
        if info.is_image:
            return [0.0]
        stride = self.clip_seconds if self.stride is None else self.stride
        # Half a frame of slack: the last frame of the clip is then still on screen at its time.
        room = info.duration + 0.5 / self.fps - self.clip_seconds
        return [] if room < 0 else [index * stride for index in range(int(room / stride + 1e-6) + 1)]

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


def clip_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a folder and the folders below it but for captions and hidden ones, sorted."""
    return [file for file in _files_below(root) if file.suffix.lower() not in CAPTION_SUFFIXES]


def _files_below(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a folder and the folders below it, but for hidden ones, sorted."""
    found: list[pathlib.Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _probe(path: pathlib.Path) -> VideoInfo | str:
    """What a file holds, or why it cannot be read."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        return probe(path)
    except BrokenClip as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _name(root: pathlib.Path, path: pathlib.Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _stable_hash(text: str) -> int:
    return zlib.crc32(text.encode())
