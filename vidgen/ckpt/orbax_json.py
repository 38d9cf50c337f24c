"""The JSON files of Orbax's checkpoints, looked at before Orbax reads them.

What Orbax (0.12) makes of damaged ones is an error of any type, in its own threads; of one that is nested too
deep, an interpreter whose recursion limit stays used up.
"""

import json
import pathlib

from vidgen.core.errors import UserError
from vidgen.core.files import read_json

__all__ = ["check_checkpoint", "check_directory"]

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
            read_json(path, remedy="it is not as Orbax wrote it")
