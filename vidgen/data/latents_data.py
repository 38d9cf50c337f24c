"""Training on latents that were computed before, clips of any sizes packed into rows."""

import dataclasses
from typing import Literal

from vidgen.data.folder import FolderData
from vidgen.data.latents_records import LatentRecords
from vidgen.data.packing import PackingOptions
from vidgen.data.sprites.source import SpritesData
from vidgen.data.tfds_clips import ArrayRecordData

__all__ = ["LatentsData", "clips_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsData:
    """Latents written by `vidgen data latents`, packed; `run.batch_size` counts rows.

    Attributes:
      kind: picks this kind of data in a config.
      path: the folder that was given as `--out`.
      packing: how rows are filled.
      clips: what the latents are of: each of its buckets is a size. Training does not read it; its own size
        is that of previews, for which its held-out clips give the prompts.
    """

    kind: Literal["latents"] = "latents"
    path: str
    packing: PackingOptions
    clips: SpritesData | FolderData | ArrayRecordData

    @property
    def num_frames(self) -> int:
        """Frames of previews, as the next three."""
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
        """The clips' latents.

        Raises:
          FileNotFoundError: there are none at `path`.
          UserError: they are damaged.
        """
        return LatentRecords(self.path)


def clips_of(
    data: SpritesData | FolderData | ArrayRecordData | LatentsData,
) -> SpritesData | FolderData | ArrayRecordData:
    """The clips that training sees, as pixels or as latents of them."""
    return data.clips if isinstance(data, LatentsData) else data
