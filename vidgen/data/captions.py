"""The captions of a folder of videos: a text file beside each, or one list for all."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vidgen.core.errors import UserError

__all__ = ["CAPTION_SUFFIXES", "FolderCaptions"]

CAPTION_SUFFIXES = frozenset({".txt", ".jsonl", ".csv"})
"""Files that are captions, never clips."""

_LISTS = ("captions.jsonl", "captions.csv")
_FILE_KEYS = ("file", "file_name", "path")
_TEXT_KEYS = ("caption", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderCaptions:
    """Captions by file.

    Attributes:
      listed: the captions of one list for the whole folder, by path.
      list_file: where they come from, or None where there is no such list.
    """

    listed: Mapping[pathlib.Path, str]
    list_file: pathlib.Path | None

    @classmethod
    def load(cls, root: pathlib.Path, list_file: str | None) -> "FolderCaptions":
        """Reads the list of captions of a folder.

        A `.jsonl` list has an object per line, a `.csv` list a row per clip under a line of column names. The
        clip's path, relative to the list or absolute, is under `file` (or `file_name` or `path`), its caption
        under `caption` (or `text`).

        Args:
          root: the folder.
          list_file: path of the list; None looks for `captions.jsonl` and `captions.csv` in the folder.

        Raises:
          UserError: there are two lists, or one cannot be read; the message names the line.
          FileNotFoundError: the list that is asked for does not exist.
        """
        if list_file is None:
            found = [root / name for name in _LISTS if (root / name).is_file()]
            if len(found) > 1:
                raise UserError(
                    f"{root} has both {' and '.join(_LISTS)}: remove one, or name the one to use."
                )
            if not found:
                return cls(listed={}, list_file=None)
            path = found[0]
        else:
            path = pathlib.Path(list_file)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such list of captions.")
        return cls(listed=dict(_read_list(path)), list_file=path)

    def of(self, clip: pathlib.Path) -> str:
        """The caption of a file: from the list, else of the `.txt` of the same name beside it, else empty.

        Raises:
          UserError: the text file is not in UTF-8.
        """
        listed = self.listed.get(_normal(clip))
        if listed is not None:
            return listed
        beside = clip.with_suffix(".txt")
        return _tidy(_read_text(beside)) if beside.is_file() else ""

    def without_clip(
        self, clips: Iterable[pathlib.Path], texts: Iterable[pathlib.Path]
    ) -> list[tuple[pathlib.Path, str]]:
        """What has a caption but is no clip of the folder, each with the reason.

        Args:
          clips: files of the folder that are not captions.
          texts: its caption files.
        """
        clips = {_normal(clip) for clip in clips}
        stems = {clip.with_suffix("") for clip in clips}
        missing = [
            (path, f"named in {self.list_file}, but there is no such file")
            for path in self.listed
            if path not in clips
        ]
        alone = [
            (text, "a caption with no video or image of the same name beside it")
            for text in texts
            if text.suffix.lower() == ".txt" and _normal(text).with_suffix("") not in stems
        ]
        return missing + alone


def _read_list(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
    for line, row in rows:
        file = _pick(row, _FILE_KEYS, path, line)
        yield _normal(path.parent / file), _tidy(_pick(row, _TEXT_KEYS, path, line))


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(_read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: found {type(row).__name__}, expected a JSON object.")
        yield line, row


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: a list of captions ends in .jsonl or .csv.")
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, row


def _pick(row: Mapping[str, Any], keys: tuple[str, ...], path: pathlib.Path, line: int) -> str:
    for key in keys:
        if isinstance(row.get(key), str):
            return row[key]
    found = ", ".join(str(key) for key in row) or "nothing"
    raise UserError(f"{path}, line {line}: expected a text under {' or '.join(keys)}; found {found}.")


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}. Save it as UTF-8.") from error


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _normal(path: pathlib.Path) -> pathlib.Path:
    return path.absolute().resolve()
