"""Captions of a folder of videos: a text file beside each clip, or one list for the folder."""

import csv
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vidgen.core.errors import UserError
from vidgen.core.files import parse_json, read_text, require_text, split_lines

__all__ = ["CAPTION_SUFFIXES", "FolderCaptions"]

CAPTION_SUFFIXES = frozenset({".txt", ".jsonl", ".csv"})
"""Suffixes of caption files, which are never clips."""

_LISTS = ("captions.jsonl", "captions.csv")
_FILE_KEYS = ("file", "file_name", "path")
_TEXT_KEYS = ("caption", "text")
_MAX_LIST_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderCaptions:
    """Captions of the files in a folder.

    Attributes:
      listed: captions from the folder's list, by absolute path; symbolic links are not resolved.
      unusable: listed files whose caption is not valid text, with the reason.
      nameless: lines of the list whose file name is not valid text, as (place, reason).
      list_file: path of the list, or None if there is no list.
      beside: caption text files, by the absolute path of the clip without its suffix.
    """

    listed: Mapping[pathlib.Path, str]
    unusable: Mapping[pathlib.Path, str] = dataclasses.field(default_factory=dict)
    nameless: tuple[tuple[str, str], ...] = ()
    list_file: pathlib.Path | None
    beside: Mapping[pathlib.Path, pathlib.Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls, root: pathlib.Path, list_file: str | None, texts: Iterable[pathlib.Path] = ()
    ) -> "FolderCaptions":
        """Reads the list of captions of a folder, and indexes its text files.

        A `.jsonl` list has one object per line; a `.csv` list has a line of column names, then one row per
        clip. `file` (or `file_name` or `path`) is the path of the clip, absolute or relative to the list;
        `caption` (or `text`) is its caption.

        Args:
          root: the folder.
          list_file: path of the list; None looks for `captions.jsonl` and `captions.csv` in the folder.
          texts: caption files of the folder; each `.txt` (in any case) belongs to the clip of the same name
            beside it.

        Raises:
          UserError: there are two lists, or one cannot be read, has other columns, or gives a file two
            different captions; the message names the line.
          FileNotFoundError: `list_file` does not exist.
        """
        beside = {_stem(text): text for text in sorted(texts) if text.suffix.lower() == ".txt"}
        if list_file is None:
            found = [root / name for name in _LISTS if (root / name).is_file()]
            if len(found) > 1:
                raise UserError(
                    f"{root} has both {' and '.join(_LISTS)}: remove one, or name the one to use."
                )
            if not found:
                return cls(listed={}, list_file=None, beside=beside)
            path = found[0]
        else:
            path = pathlib.Path(list_file)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such list of captions.")
        return _read_list(path, beside)

    def of(self, clip: pathlib.Path) -> str:
        """Caption of a file: from the list, else from the `.txt` of the same name beside it, else empty.

        Two links to one file are two clips with separate captions; a list may also name the target of a link.

        Raises:
          UserError: the text file is not UTF-8, or the caption has characters that are not text.
          OSError: the text file cannot be read.
        """
        path = _absolute(clip)
        if path in self.unusable:
            raise UserError(self.unusable[path])
        listed = self.listed.get(path)
        if listed is None and self.listed:
            listed = self._by_target.get(_target(clip))
        if listed is not None:
            return listed
        text = self.beside.get(_stem(clip)) or clip.with_suffix(".txt")
        return _tidy(read_text(text)) if text.is_file() else ""

    def without_clip(
        self, clips: Iterable[pathlib.Path], texts: Iterable[pathlib.Path]
    ) -> list[tuple[pathlib.Path | str, str]]:
        """Captions without a clip in the folder, as (path or place, reason).

        Args:
          clips: files of the folder that are not caption files.
          texts: caption files of the folder.
        """
        clips = list(clips)
        names = {_absolute(clip) for clip in clips}
        stems = {_stem(clip) for clip in clips}
        absent = [path for path in (*self.listed, *self.unusable) if path not in names]
        targets = {_target(clip) for clip in clips} if absent else set()
        missing = [
            (path, f"named in {self.list_file}, but there is no such file")
            for path in absent
            if _target(path) not in targets
        ]
        unmatched: list[tuple[pathlib.Path | str, str]] = []
        for text in texts:
            if text.suffix.lower() != ".txt":
                continue
            if _stem(text) not in stems:
                unmatched.append((text, "a caption with no video or image of the same name beside it"))
            elif (used := self.beside.get(_stem(text), text)) != text:
                unmatched.append((text, f"a caption of the same clip as {used.name}, which is used"))
        return [*missing, *unmatched, *self.nameless]

    @functools.cached_property
    def _by_target(self) -> dict[str, str | None]:
        """Captions by resolved path; None for a target whose links have different captions."""
        found: dict[str, str | None] = {}
        for path, caption in self.listed.items():
            target = _target(path)
            found[target] = caption if found.get(target, caption) == caption else None
        return found


def _read_list(path: pathlib.Path, beside: Mapping[pathlib.Path, pathlib.Path]) -> FolderCaptions:
    listed: dict[pathlib.Path, str] = {}
    unusable: dict[pathlib.Path, str] = {}
    nameless: list[tuple[str, str]] = []
    lines: dict[pathlib.Path, int] = {}
    for line, row in _json_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path):
        where = f"{path}, line {line}"
        name, text = _pick(row, _FILE_KEYS, where), _tidy(_pick(row, _TEXT_KEYS, where))
        try:
            file = _absolute(path.parent / require_text(name, "the file's name"))
        except UserError as error:
            nameless.append((where, str(error)))
            continue
        if file in lines and listed.get(file) != text:
            raise UserError(f"{where}: {name} has another caption in line {lines[file]}: keep one of them")
        lines[file] = line
        try:
            listed[file] = require_text(text, where)
        except UserError as error:
            unusable[file] = str(error)
    return FolderCaptions(
        listed=listed, unusable=unusable, nameless=tuple(nameless), list_file=path, beside=beside
    )


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(split_lines(_list_text(path)), start=1):
        if not text.strip():
            continue
        row = parse_json(text, f"{path}, line {line}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: found {type(row).__name__}, expected a JSON object.")
        yield line, row


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: a list of captions ends in .jsonl or .csv.")
    reader = csv.reader(io.StringIO(_list_text(path), newline=""), strict=True)
    try:
        columns = next(reader, [])
        for keys in (_FILE_KEYS, _TEXT_KEYS):
            if sum(columns.count(key) for key in keys) != 1:
                raise UserError(
                    f"{path}, line 1: expected one column {' or '.join(keys)}; "
                    f"found {', '.join(columns)[:200] or 'nothing'}: the first line names the columns"
                )
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: found {len(fields)} fields, expected {len(columns)} as "
                    "in the first line: put texts with commas in double quotes"
                )
            yield reader.line_num, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not CSV ({error}): a quoted text must end with a double "
            "quote, and double quotes inside it must be doubled"
        ) from error


def _pick(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        if isinstance(row.get(key), str):
            return row[key]
    found = ", ".join(str(key) for key in row) or "nothing"
    raise UserError(f"{where}: expected a text under {' or '.join(keys)}; found {found}.")


def _list_text(path: pathlib.Path) -> str:
    return read_text(path, max_bytes=_MAX_LIST_BYTES, with_nul=True)


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _absolute(path: pathlib.Path) -> pathlib.Path:
    """Absolute path with links unresolved: each of two links to one file is a clip."""
    return pathlib.Path(os.path.abspath(path))


def _stem(path: pathlib.Path) -> pathlib.Path:
    return _absolute(path).with_suffix("")


def _target(path: pathlib.Path) -> str:
    return os.path.realpath(path)
