"""What a set of clips is to the rest of the code: a sequence with random access."""

from typing import Any, Protocol, runtime_checkable

__all__ = ["BrokenClip", "ClipSource"]


@runtime_checkable
class ClipSource(Protocol):
    """Clips by index. Reading must be deterministic in the index and safe from several threads at once."""

    def __len__(self) -> int:
        """How many clips there are."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip.

        Returns:
          `video` uint8 [t h w 3]; `caption` str; `name` str, unique and readable by a person; and any extra
          numpy arrays of a shape that is the same for every clip, or strings.

        Raises:
          BrokenClip: the clip cannot be decoded; the loader takes another one in its place.
        """
        ...


class BrokenClip(Exception):
    """A clip that cannot be decoded.

    Attributes:
      name: which one, as a person would name it.
      reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
