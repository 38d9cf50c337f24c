"""Folder of a TFDS builder; its JSON is validated before TFDS reads it."""

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
"""Feature classes of clip records. TFDS would import any class that features.json names."""


def records_folder(path: pathlib.Path) -> pathlib.Path:
    """Folder of a builder's files: `path` itself or the builder's folder below it.

    Raises:
      FileNotFoundError: neither folder has a `dataset_info.json`.
    """
    for folder in (path, path / BUILDER_NAME / VERSION):
        if (folder / "dataset_info.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path}: no records here (no dataset_info.json); `vidgen data build` writes them."
    )


def open_records(path: pathlib.Path, split: str) -> Sequence[Mapping[str, Any]]:
    """Opens the records of a split; each record holds one clip.

    Args:
      path: output folder given to the builder, or the folder that contains `dataset_info.json`.

    Raises:
      FileNotFoundError: `path` holds no records.
      UserError: the split does not exist; the JSON is damaged, or names classes or files that clip records do
        not use.
    """
    folder = records_folder(path)
    _check(folder)
    # Imported late: takes half a second, and no other kind of data needs it.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(folder))
        splits = list(builder.info.splits)
        records = builder.as_data_source(split=split) if split in splits else ()  # pyright: ignore
    except Exception as error:  # protobuf, JSON, enum and TFDS errors
        found = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{folder / _INFO} or {_FEATURES} is damaged ({found}): {_REMEDY}") from error
    if split not in splits:
        raise UserError(f'{path}: no split "{split}"; there are: {", ".join(splits) or "none"}.')
    return records


def _check(folder: pathlib.Path) -> None:
    """Raises UserError if the JSON names unexpected feature classes, or files outside the folder."""
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
            f"{folder / _INFO}: found {str(strange[0])[:80]!r} in the name of a file, expected a plain "
            f"name in the same folder: {_REMEDY}"
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
    """Yields the JSON values from which TFDS builds the names of the record files."""
    splits = info.get("splits")
    for split in splits if isinstance(splits, list) else ():
        if isinstance(split, dict):
            yield from (split[key] for key in _NAMES if key in split)
