"""The files of a folder, each looked into once."""

import collections
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
      stray: captions without a file and folders that are not read, as (name, reason).
    """

    found: tuple[FoundFile, ...]
    captions: FolderCaptions
    stray: tuple[tuple[str, str], ...]

    @classmethod
    def look(cls, root: pathlib.Path, captions: str | None) -> "FolderFiles":
        """Looks at every file of a folder and of those below it, decoding one frame of each video.

        Links are followed; a folder that several lead to is read once. Names that begin with a dot are left
        out.

        Args:
          captions: path of a list of captions, or None.

        Raises:
          NotADirectoryError: there is no such folder.
          UserError: a list of captions cannot be read.
        """
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder of videos.")
        files, left_out = _files_below(root)
        clips = [file for file in files if file.suffix.lower() not in CAPTION_SUFFIXES]
        texts = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
        listed = FolderCaptions.load(root, captions, texts)
        with concurrent.futures.ThreadPoolExecutor(_PROBE_THREADS) as pool:
            infos = list(pool.map(_probe, clips))
        return cls(
            found=tuple(
                FoundFile(path=path, name=_name(root, path), info=info)
                for path, info in zip(clips, infos, strict=True)
            ),
            captions=listed,
            stray=tuple(
                (_name(root, path), why) for path, why in (*left_out, *listed.without_clip(clips, texts))
            ),
        )


def clip_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a folder and the folders below it but for captions and hidden ones, sorted."""
    return [file for file in _files_below(root)[0] if file.suffix.lower() not in CAPTION_SUFFIXES]


def _files_below(root: pathlib.Path) -> tuple[list[pathlib.Path], list[tuple[pathlib.Path, str]]]:
    """Every file of a folder and those below it but for hidden ones, sorted; folders not read, and why.

    Folders that links lead to come last, so that a folder is found under its own name where it has one here.
    """
    files: list[pathlib.Path] = []
    left_out: list[tuple[pathlib.Path, str]] = []
    read: dict[str, pathlib.Path] = {}
    folders, links = [root], collections.deque[pathlib.Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        target = os.path.realpath(folder)
        if target in read:
            left_out.append((folder, f"a link to {_shown(read[target])}, which is read already"))
            continue
        read[target] = folder
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            left_out.append((folder, f"cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = pathlib.Path(entry.path)
            if not entry.is_dir():
                files.append(path)
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return sorted(files), left_out


def _probe(path: pathlib.Path) -> VideoInfo | str:
    """What a file holds, or why it cannot be read."""
    try:
        if _shown(path) != str(path):
            return "its name is not UTF-8: rename it"
        if path.is_symlink() and not path.exists():
            return "a link to a file that is not there"
        if path.stat().st_size == 0:
            return "not a regular file" if not path.is_file() else "the file is empty"
        return probe(path)
    except BrokenClip as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _name(root: pathlib.Path, path: pathlib.Path | str) -> str:
    if isinstance(path, str):
        return path
    return _shown(path.relative_to(root) if path.is_relative_to(root) else path)


def _shown(path: pathlib.Path) -> str:
    """The path with forward slashes, where bytes that are not UTF-8 are written as numbers."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
