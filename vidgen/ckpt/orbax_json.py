"""The JSON files of Orbax's checkpoints, looked at before Orbax reads them.

What Orbax (0.12) makes of damaged ones is an error of any type, in its own threads; of one that is nested too
deep, an interpreter whose recursion limit stays used up.
"""

import json
import pathlib
from typing import Any

from vidgen.core.errors import UserError
from vidgen.core.files import read_json

__all__ = ["check_checkpoint", "check_directory"]

_REMEDY = "it is not as Orbax wrote it"
_MAX_LEVELS = 64
_OF_A_STEP = "_CHECKPOINT_METADATA"
_INSIDE = ("*/_METADATA", "*/_sharding", "*/_strings.json", "*/array_metadatas/process_*")
_TYPES = {
    "item_handlers": dict | str | None,
    "metrics": dict | None,
    "performance_metrics": dict | None,
    "init_timestamp_nsecs": int | None,
    "commit_timestamp_nsecs": int | None,
    "custom_metadata": dict | None,
}


def check_directory(directory: pathlib.Path) -> None:
    """Checks the JSON file of each checkpoint that Orbax reads when the directory is opened.

    Nothing is lost with it: Orbax passes over one that is missing or no JSON.

    Raises:
      UserError: one is JSON, and not what Orbax takes.
    """
    for path in sorted(directory.glob(f"*/{_OF_A_STEP}")):
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
    """Checks what else there is of JSON in a checkpoint's folder.

    Raises:
      UserError: a file is damaged.
    """
    for pattern in _INSIDE:
        for path in sorted(folder.glob(pattern)):
            values = read_json(path, remedy=_REMEDY)
            leaves = values.get("tree_metadata", {})
            if not isinstance(leaves, dict) or not all(map(_is_leaf, leaves.values())):
                raise UserError(f"{path}: tree_metadata is no list of arrays: {_REMEDY}")


def _is_leaf(leaf: Any) -> bool:
    """Whether an entry gives a place in a tree, of which Orbax builds every level."""
    keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
    return isinstance(keys, list) and 0 < len(keys) <= _MAX_LEVELS
