"""A TFDS builder that writes any clips as ArrayRecord files; no TensorFlow needed."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.data.source import BrokenClip, ClipSource
from vidgen.data.tfds_clips import Encoding, encode_record
from vidgen.data.tfds_folder import BUILDER_NAME, VERSION

__all__ = ["BuildReport", "VidgenClips", "build_records"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What was written.

    Attributes:
      folder: the folder that holds `dataset_info.json` and the records.
      num_clips: by split.
      broken: clips that could not be decoded and are left out: the reason by name.
    """

    folder: pathlib.Path
    num_clips: Mapping[str, int]
    broken: Mapping[str, str]


class VidgenClips(tfds.core.GeneratorBasedBuilder):
    """Clips, each one record: encoded frames, caption, name, and the rest as JSON."""

    VERSION = tfds.core.Version(VERSION)
    name = BUILDER_NAME

    def __init__(
        self, *, sources: Mapping[str, ClipSource], fps: float, encoding: Encoding = "lossless", **kwargs: Any
    ):
        """Writes nothing yet.

        Args:
          sources: the clips by split.
          fps: their frames per second.
          encoding: how frames are kept.
          **kwargs: of the TFDS builder, `data_dir` above all.
        """
        self.broken: dict[str, str] = {}
        self._sources = sources
        self._fps = fps
        self._encoding: Encoding = encoding
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Video clips with captions. `clip` is a whole MP4 file; `metadata` is JSON.",
            # Text, not Video: TFDS cannot write or read Video without TensorFlow.
            features=tfds.features.FeaturesDict(
                {"clip": text(), "caption": text(), "name": text(), "metadata": text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split, source) for split, source in self._sources.items()}

    def _generate_examples(self, split: str, source: ClipSource) -> Iterator[tuple[int, dict[str, Any]]]:
        written = 0
        for index in range(len(source)):
            try:
                example = source[index]
            except BrokenClip as error:
                self.broken[error.name] = error.reason
                get_logger(__name__).warning("broken clip left out: %s", error)
                continue
            written += 1
            yield index, encode_record(example, fps=self._fps, encoding=self._encoding)
        if not written:
            raise UserError(
                f'"{split}": none of its {len(source)} clips can be decoded: '
                f"{dict(list(self.broken.items())[:3])}."
            )


def build_records(
    sources: Mapping[str, ClipSource], out: pathlib.Path, *, fps: float, encoding: Encoding
) -> BuildReport:
    """Writes clips as records, to be read with `ArrayRecordData(path=out)`.

    The folder appears whole or not at all. Broken clips are left out and reported.

    Args:
      sources: the clips by split; all of one frame rate.
      out: the folder to write to, with no records in it yet.
      fps: frames per second of the clips.
      encoding: how frames are kept.

    Raises:
      FileExistsError: there are records in `out` already.
      UserError: a split has no clip that can be decoded.
    """
    builder = VidgenClips(sources=sources, fps=fps, encoding=encoding, data_dir=str(out))
    folder = pathlib.Path(builder.data_dir)
    if folder.exists():
        raise FileExistsError(
            f"{folder}: there are records here already; remove them or choose another folder."
        )
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)
    counts = {split: builder.info.splits[split].num_examples for split in sources}
    return BuildReport(folder=folder, num_clips=counts, broken=builder.broken)
