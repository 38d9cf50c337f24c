"""TFDS builder that writes any clip source as ArrayRecord files; needs no TensorFlow."""

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
    """Result of `build_records`.

    Attributes:
      folder: folder that contains `dataset_info.json` and the records.
      num_clips: number of clips written, by split.
      broken: clips left out because they could not be decoded, name -> reason.
    """

    folder: pathlib.Path
    num_clips: Mapping[str, int]
    broken: Mapping[str, str]


class VidgenClips(tfds.core.GeneratorBasedBuilder):
    """One record per clip: encoded frames, caption, name, and the remaining entries as JSON."""

    VERSION = tfds.core.Version(VERSION)
    name = BUILDER_NAME

    def __init__(
        self, *, sources: Mapping[str, ClipSource], fps: float, encoding: Encoding = "lossless", **kwargs: Any
    ):
        """Creates the builder; writes nothing yet.

        Args:
          sources: clips by split.
          fps: frames per second of the clips.
          encoding: encoding of the frames.
          **kwargs: arguments of the TFDS builder, chiefly `data_dir`.
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
    """Writes clips as records, which `ArrayRecordData(path=out)` reads.

    The folder is written atomically. Broken clips are left out and reported.

    Args:
      sources: clips by split, all of one frame rate.
      out: output folder, without records.
      fps: frames per second of the clips.
      encoding: encoding of the frames.

    Raises:
      FileExistsError: `out` already holds records.
      UserError: no clip of a split can be decoded.
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
