"""Scan of a folder: each file is probed once."""

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
      path: path of the file.
      name: path relative to the folder, with forward slashes.
      info: metadata, or the reason why the file cannot be read.
    """

    path: pathlib.Path
    name: str
    info: VideoInfo | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """Contents of a folder.

    Attributes:
      found: files other than caption files, sorted.
      captions: captions of the files.
      stray: captions without a clip, and folders that are not read, as (name, reason).
    """

    found: tuple[FoundFile, ...]
    captions: FolderCaptions
    stray: tuple[tuple[str, str], ...]

    @classmethod
    def look(cls, root: pathlib.Path, captions: str | None) -> "FolderFiles":
        """Scans a folder and its subfolders; decodes one frame of each video.

        Links are followed; a folder that several links point to is read once. Names that begin with a dot are
        skipped.

        Args:
          root: the folder.
          captions: path of a list of captions, or None.

        Raises:
          NotADirectoryError: `root` is not a folder.
          UserError: a list of captions cannot be read.
        """
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder of videos.")
        files, unread = _files_below(root)
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
                (_name(root, path), why) for path, why in (*unread, *listed.without_clip(clips, texts))
            ),
        )


def clip_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Files of a folder and its subfolders, sorted, except caption files and hidden files."""
    return [file for file in _files_below(root)[0] if file.suffix.lower() not in CAPTION_SUFFIXES]


def _files_below(root: pathlib.Path) -> tuple[list[pathlib.Path], list[tuple[pathlib.Path, str]]]:
    """Files of a folder and its subfolders, sorted, except hidden ones; and unread folders with the reason.

    Linked folders are read last, so that a folder inside `root` is found at its real path.
    """
    files: list[pathlib.Path] = []
    unread: list[tuple[pathlib.Path, str]] = []
    read: dict[str, pathlib.Path] = {}
    folders, links = [root], collections.deque[pathlib.Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        target = os.path.realpath(folder)
        if target in read:
            unread.append((folder, f"a link to {_shown(read[target])}, which is read already"))
            continue
        read[target] = folder
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            unread.append((folder, f"cannot be read: {error.strerror}"))
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
    return sorted(files), unread


def _probe(path: pathlib.Path) -> VideoInfo | str:
    """Metadata of a file, or the reason why it cannot be read."""
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
    """Path with forward slashes; bytes that are not UTF-8 are escaped as numbers."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
