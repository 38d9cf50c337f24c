"""User files: bounded reads of text and JSON, atomic writes of files and folders."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from vidgen.core.errors import UserError

__all__ = [
    "check_target",
    "parse_json",
    "read_json",
    "read_lines",
    "read_text",
    "replacing",
    "require_text",
    "split_lines",
]

_MAX_BYTES = 64 << 20
"""Size limit of a text or JSON file; the largest in use are tokenizers of about 20 MB."""
_MAX_DEPTH = 64
"""Nesting limit of mappings and lists."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_text(path: pathlib.Path | str, *, max_bytes: int = _MAX_BYTES, with_nul: bool = False) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Args:
      with_nul: accepts NUL characters, so that the caller can report their position.

    Raises:
      UserError: the file is longer than `max_bytes`, not UTF-8, or has NUL characters (a binary file).
      OSError: the file cannot be read; the message names it.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path}: longer than {max_bytes:,} bytes, the limit for text files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): save it as UTF-8") from error
    return text if with_nul else require_text(text, str(path))


def require_text(text: str, where: str) -> str:
    """Returns `text` if it can be written as UTF-8 and displayed.

    Raises:
      UserError: it has a NUL character or an unpaired surrogate; the message begins with `where`.
    """
    found = _NO_TEXT.search(text)
    if found:
        kind = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        raise UserError(f"{where}: character {found.start()} is {kind}, which is not text: remove it")
    return text


def split_lines(text: str) -> list[str]:
    r"""Lines of `text`, split at \n, \r\n and \r only.

    `str.splitlines` also splits at vertical tabs, form feeds, U+0085, U+2028 and U+2029, which are ordinary
    characters in text files, CSV and JSON lines.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: pathlib.Path | str, *, max_bytes: int = _MAX_BYTES) -> list[str]:
    """Lines of a UTF-8 text file, without line terminators; see `split_lines`.

    Raises:
      UserError, OSError: as in `read_text`.
    """
    return split_lines(read_text(path, max_bytes=max_bytes))


def parse_json(text: str | bytes, where: str) -> Any:
    """Value of a JSON text.

    Args:
      text: bytes are decoded as UTF-8.
      where: file, and line or part of it, with which error messages begin.

    Raises:
      UserError: the text is not JSON; a mapping has a duplicate key; a number is not finite; mappings and
        lists are nested deeper than 64 levels.
    """
    try:
        value = json.loads(
            text, parse_constant=_not_finite, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except RecursionError as error:
        raise UserError(f"{where}: nested deeper than {_MAX_DEPTH} levels, which is not supported") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
        raise UserError(f"{where}: not JSON ({error})") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise UserError(f"{where}: nested deeper than {_MAX_DEPTH} levels, which is not supported")


def read_json(path: pathlib.Path | str, *, remedy: str, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Mapping stored in a JSON file.

    Args:
      remedy: what to do if the file is missing or invalid; the message ends with it.

    Raises:
      FileNotFoundError: the file is missing.
      UserError: it is not a regular file, longer than `max_bytes`, not UTF-8, rejected by `parse_json`, or
        not a mapping.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    if not path.is_file():  # Reading a pipe may block forever.
        raise UserError(f"{path} is no regular file: {remedy}")
    try:
        value = parse_json(read_text(path, max_bytes=max_bytes), str(path))
        if not isinstance(value, dict):
            raise UserError(f"{path}: found JSON of type {type(value).__name__}, expected a mapping")
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from error
    return value


def check_target(path: pathlib.Path | str, *, folder: bool = False) -> None:
    """Checks that a file or folder can be written, before the work that produces it.

    Args:
      folder: the target is a folder; an existing one must be empty.

    Raises:
      UserError: the target exists and is of the other kind, or is a folder that is not empty; its name is too
        long; its parent is not a folder or not writable.
    """
    path = pathlib.Path(path)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise UserError(f"{path}: this name cannot be written to ({error}): choose another") from error
    if folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder: name another one, or remove it")
    if not folder and path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {parent}")


@contextlib.contextmanager
def replacing(path: pathlib.Path | str, *, folder: bool = False) -> Iterator[pathlib.Path]:
    """Temporary file or folder beside `path`: replaces `path` on success, is deleted on failure.

    The temporary name is new, so nothing else is touched; the mode is that of a newly created file or folder.
    An existing file is replaced; an existing folder only if it is empty.

    Raises:
      UserError: as in `check_target`.
    """
    path = pathlib.Path(path)
    check_target(path, folder=folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    names: dict[str, Any] = {"prefix": f".{path.name[:32]}.", "suffix": ".part", "dir": path.parent}
    if folder:
        temporary = pathlib.Path(tempfile.mkdtemp(**names))
    else:
        handle, name = tempfile.mkstemp(**names)
        os.close(handle)
        temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod((0o777 if folder else 0o666) & ~_umask())
        if folder and path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _not_finite(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f'key "{twice[:80]}" stands twice')
    return values
