"""The files of a folder, each looked into once."""

import concurrent.futures
import dataclasses
import os
import pathlib

from vidgen.data.captions import CAPTION_SUFFIXES, FolderCaptions
from vidgen.data.source import BrokenClip
from vidgen.data.video_io import VideoInfo, probe

__all__ = ["FolderFiles", "FoundFile", "clip_files"]

_PROBE_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file of the folder.

    Attributes:
      path: where it is.
      name: its path below the folder, with forward slashes.
      info: what it holds, or why it cannot be read.
    """

    path: pathlib.Path
    name: str
    info: VideoInfo | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """What is in a folder.

    Attributes:
      found: its files but for captions, sorted.
      captions: of all of them.
      stray: captions without a file, as (name, reason).
    """

    found: tuple[FoundFile, ...]
    captions: FolderCaptions
    stray: tuple[tuple[str, str], ...]

    @classmethod
    def look(cls, root: pathlib.Path, captions: str | None) -> "FolderFiles":
        """Looks at every file of a folder and of those below it, decoding one frame of each video.

        Names that begin with a dot are left out.

        Args:
          captions: path of a list of captions, or None.

        Raises:
          NotADirectoryError: there is no such folder.
          UserError: a list of captions cannot be read.
        """
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder of videos.")
        clips = clip_files(root)
        texts = [file for file in _files_below(root) if file.suffix.lower() in CAPTION_SUFFIXES]
        listed = FolderCaptions.load(root, captions)
        with concurrent.futures.ThreadPoolExecutor(_PROBE_THREADS) as pool:
            infos = list(pool.map(_probe, clips))
        return cls(
            found=tuple(
                FoundFile(path=path, name=_name(root, path), info=info)
                for path, info in zip(clips, infos, strict=True)
            ),
            captions=listed,
            stray=tuple((_name(root, path), why) for path, why in listed.without_clip(clips, texts)),
        )


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
