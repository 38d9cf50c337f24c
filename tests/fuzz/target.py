"""What is fuzzed: valid files, how they are damaged, and the product's own way of reading them."""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping

from tests.fuzz.mutate import Mutator

__all__ = ["Target", "damage"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of input.

    Attributes:
      make: writes valid files into a folder, the same ones each time.
      damaged: patterns of the files of which one is damaged, and how.
      read: reads the folder as the product does; takes nothing that was made before.
      donor: name of the target whose first file splices take from; None is this one.
      writes: patterns of files that reading may write or change.
      names: what else than a file of the folder an error may name.
    """

    make: Callable[[pathlib.Path], object]
    damaged: Mapping[str, Mutator]
    read: Callable[[pathlib.Path], object]
    donor: str | None = None
    writes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def damage(target: Target, folder: pathlib.Path, donor: bytes, rng: random.Random) -> pathlib.Path:
    """Damages one file of a folder in place; the same generator state damages it in the same way.

    Returns:
      The file.
    """
    pattern = rng.choice(sorted(target.damaged))
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    assert files, f"{folder} has no {pattern}"
    file = rng.choice(files)
    file.write_bytes(target.damaged[pattern](file.read_bytes(), rng, donor))
    return file
