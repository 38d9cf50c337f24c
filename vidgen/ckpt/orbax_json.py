"""Validation of the JSON files in Orbax checkpoints, before Orbax reads them.

On damaged files Orbax (0.12) raises errors of any type, in background threads. A file that is nested too
deeply leaves the interpreter with its recursion limit used up.
"""

import json
import pathlib
from typing import Any

from vidgen.core.errors import UserError
from vidgen.core.files import read_json

__all__ = ["check_checkpoint", "check_directory"]

_REMEDY = "it is not as Orbax wrote it"
_MAX_LEVELS = 64
_STEP_METADATA = "_CHECKPOINT_METADATA"
_ARRAY_METADATA = ("*/_METADATA", "*/_sharding", "*/_strings.json", "*/array_metadatas/process_*")
_TYPES = {
    "item_handlers": dict | str | None,
    "metrics": dict | None,
    "performance_metrics": dict | None,
    "init_timestamp_nsecs": int | None,
    "commit_timestamp_nsecs": int | None,
    "custom_metadata": dict | None,
}


def check_directory(directory: pathlib.Path) -> None:
    """Validates the JSON file of each checkpoint that Orbax reads on opening the directory.

    A file that is missing or not JSON passes: Orbax ignores it.

    Raises:
      UserError: a file is JSON, but not in Orbax's format.
    """
    for path in sorted(directory.glob(f"*/{_STEP_METADATA}")):
        try:
            values = json.loads(path.read_bytes())
        except ValueError:
            continue
        except RecursionError:
            values = None
        wrong = not isinstance(values, dict) or [
            name for name, kind in _TYPES.items() if not isinstance(values.get(name), kind)
        ]
        if wrong:
            raise UserError(f"{path} is damaged: remove this file, which nothing else needs")


def check_checkpoint(folder: pathlib.Path) -> None:
    """Validates the other JSON files in a checkpoint's folder.

    Raises:
      UserError: a file is damaged.
    """
    for pattern in _ARRAY_METADATA:
        for path in sorted(folder.glob(pattern)):
            values = read_json(path, remedy=_REMEDY)
            leaves = values.get("tree_metadata", {})
            if not isinstance(leaves, dict) or not all(map(_is_leaf, leaves.values())):
                raise UserError(f"{path}: tree_metadata is no list of arrays: {_REMEDY}")


def _is_leaf(leaf: Any) -> bool:
    """Whether an entry has a path of limited depth: Orbax builds every level of it."""
    keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
    return isinstance(keys, list) and 0 < len(keys) <= _MAX_LEVELS
