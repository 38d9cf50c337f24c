"""Warnings about captions that the byte encoder truncates."""

from collections.abc import Mapping
from typing import Any

from vidgen.core.logging import get_logger

__all__ = ["LongCaptions"]

_SHOWN = 3
"""Number of names in a log line."""


class LongCaptions:
    """Counts captions longer than the encoder's limit; logs the first, the tenth and so on."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._names: dict[str, int] = {}
        self._next = 1

    def note(self, batch: Mapping[str, Any]) -> None:
        """Checks a loader's batch: `caption` and `name`, or `rows` of packed clips with these keys."""
        if "rows" in batch:
            clips = [(clip["caption"], clip["name"]) for row in batch["rows"] for clip in row]
        else:
            clips = zip(batch["caption"], batch.get("name", batch["caption"]), strict=True)
        for caption, name in clips:
            size = len(caption.encode())
            if size > self._max_bytes:
                self._names[name] = size
        if len(self._names) < self._next:
            return
        shown = ", ".join(f"{name} ({size} bytes)" for name, size in list(self._names.items())[:_SHOWN])
        get_logger(__name__).warning(
            "%d captions so far are cut at task.text.max_bytes=%d, their ends are not learned: %s%s",
            len(self._names),
            self._max_bytes,
            shown,
            ", ..." if len(self._names) > _SHOWN else "",
        )
        self._next = 10 * len(self._names)
