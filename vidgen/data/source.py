"""Interface of a set of clips: a sequence with random access."""

from typing import Any, Protocol, runtime_checkable

__all__ = ["BrokenClip", "ClipSource"]


@runtime_checkable
class ClipSource(Protocol):
    """Clips by index; reading must be deterministic in the index and thread-safe."""

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one clip.

        Returns:
          `video` uint8 [t h w 3]; `caption` str; `name` str, unique and human-readable; and any extra
          strings or numpy arrays, each array of the same shape for every clip.

        Raises:
          BrokenClip: the clip cannot be decoded; the loader replaces it by another one.
        """
        ...


class BrokenClip(Exception):
    """A clip that cannot be decoded.

    Attributes:
      name: human-readable name of the clip.
      reason: what is wrong with the clip.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
