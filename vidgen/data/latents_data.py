"""Options for training on precomputed latents: clips of any size, packed into rows."""

import dataclasses
from typing import Literal

from vidgen.data.folder import FolderData
from vidgen.data.latents_records import LatentRecords
from vidgen.data.packing import PackingOptions
from vidgen.data.sprites.source import SpritesData
from vidgen.data.tfds_clips import ArrayRecordData

__all__ = ["LatentsData"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsData:
    """Latents written by `vidgen data latents`; `run.batch_size` counts packed rows.

    Attributes:
      kind: selects this kind of data in a config.
      path: output folder of `vidgen data latents` (its `--out`).
      packing: how packed rows are filled.
      clips: the clips that the latents encode; each of its buckets is one clip size. Training does not read
        it: previews take their size from it, and their prompts from its held-out clips.
    """

    kind: Literal["latents"] = "latents"
    path: str
    packing: PackingOptions
    clips: SpritesData | FolderData | ArrayRecordData

    @property
    def num_frames(self) -> int:
        """Frames of a preview; `height`, `width` and `fps` also describe previews."""
        return self.clips.num_frames

    @property
    def height(self) -> int:
        return self.clips.height

    @property
    def width(self) -> int:
        return self.clips.width

    @property
    def fps(self) -> float:
        return self.clips.fps

    def source(self) -> LatentRecords:
        """Opens the latents of the clips.

        Raises:
          FileNotFoundError: `path` holds no latents.
          UserError: the latents are damaged.
        """
        return LatentRecords(self.path)
