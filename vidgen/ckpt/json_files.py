"""JSON files that appear whole."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vidgen.parallel import processes

__all__ = ["read_json", "write_json"]


def read_json(path: pathlib.Path, *, remedy: str) -> dict[str, Any]:
    """What a file says.

    Raises:
      FileNotFoundError: it is missing; with the remedy.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    return json.loads(path.read_text())


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a file, which appears whole; process 0 does."""
    if not processes.is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)
