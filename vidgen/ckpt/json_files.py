"""JSON files that are written atomically."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vidgen.core.files import replacing
from vidgen.parallel import processes

__all__ = ["write_json"]


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, on process 0."""
    if not processes.is_main_process():
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
