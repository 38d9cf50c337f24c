"""The folder of a TFDS builder, whose JSON is looked at before TFDS reads it."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vidgen.ckpt.tensor_files import is_plain_name
from vidgen.core.errors import UserError
from vidgen.core.files import read_json

__all__ = ["BUILDER_NAME", "VERSION", "open_records", "records_folder"]

BUILDER_NAME = "vidgen_clips"
VERSION = "1.0.0"

_INFO, _FEATURES = "dataset_info.json", "features.json"
_REMEDY = "write the records again with `vidgen data build`"
_NAMES = ("name", "filepathTemplate", "filepath_template")
_CLASSES = frozenset(
    {
        "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "tensorflow_datasets.core.features.text_feature.Text",
    }
)
"""What clips are made of. TFDS imports whatever class a features.json names."""


def records_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of a builder's files, below `path` or `path` itself.

    Raises:
      FileNotFoundError: there is none.
    """
    for folder in (path, path / BUILDER_NAME / VERSION):
        if (folder / "dataset_info.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path}: no records here (no dataset_info.json); `vidgen data build` writes them."
    )


def open_records(path: pathlib.Path, split: str) -> Sequence[Mapping[str, Any]]:
    """The records of a split; those of one clip each.

    Args:
      path: what was given to the builder, or the folder with `dataset_info.json` in it.

    Raises:
      FileNotFoundError: there are no records at `path`.
      UserError: there is no such split; the JSON is damaged, or names classes or files that records of clips
        do not have.
    """
    folder = records_folder(path)
    _check(folder)
    # Half a second of imports that no other kind of data needs.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(folder))
        splits = list(builder.info.splits)
        records = builder.as_data_source(split=split) if split in splits else ()  # pyright: ignore
    except Exception as error:  # Of protocol buffers, JSON, enumerations and its own.
        found = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{folder / _INFO} or {_FEATURES} is damaged ({found}): {_REMEDY}") from error
    if split not in splits:
        raise UserError(f'{path}: no split "{split}"; there are: {", ".join(splits) or "none"}.')
    return records


def _check(folder: pathlib.Path) -> None:
    """Raises UserError where the JSON names what it should not."""
    features = read_json(folder / _FEATURES, remedy=_REMEDY)
    if strange := sorted(set(map(str, _class_names(features))) - _CLASSES):
        raise UserError(
            f"{folder / _FEATURES}: found features of type {strange[0][:80]!r}, expected texts alone: "
            f"{_REMEDY}"
        )
    info = read_json(folder / _INFO, remedy=_REMEDY)
    names = [info.get("name", "x"), *_file_names(info)]
    if strange := [name for name in names if not is_plain_name(name)]:
        raise UserError(
            f"{folder / _INFO}: found {str(strange[0])[:80]!r} in the name of a file, which lies in the same "
            f"folder: {_REMEDY}"
        )


def _class_names(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("pythonClassName", "python_class_name"):
                yield item
            yield from _class_names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_names(item)


def _file_names(info: Mapping[str, Any]) -> Iterator[Any]:
    """What the names of the files of records are made of."""
    splits = info.get("splits")
    for split in splits if isinstance(splits, list) else ():
        if isinstance(split, dict):
            yield from (
                split[key] for key in ("name", "filepathTemplate", "filepath_template") if key in split
            )
