"""Files in the workdir of a LoRA run about its base, the weights that it does not train."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import ClassVar

from vidgen.core.config import resolve
from vidgen.core.files import read_json

__all__ = ["BaseFiles", "BaseRecord"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """Weights of `run.init_from` that a LoRA run began with.

    Attributes:
      step: step of the run that they come from.
      digests: of the arrays in the dtypes of training; empty if they were not exact.
    """

    step: int | None = None
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """Files of a LoRA run about its base."""

    workdir: pathlib.Path

    REMEDY: ClassVar[str] = (
        "give the path of those weights to `vidgen train` with --config.run.init_from=PATH, or as "
        "run.init_from in the run's config.json"
    )

    @property
    def weights(self) -> pathlib.Path:
        """The base itself, if the run has it from no source."""
        return self.workdir / "base" / "model.safetensors"

    @property
    def source(self) -> pathlib.Path:
        """JSON of a `BaseRecord`."""
        return self.workdir / "base" / "source.json"

    def record(self) -> BaseRecord:
        """The record; empty if there is none."""
        if not self.source.exists():
            return BaseRecord()
        values = read_json(self.source, remedy="remove it, if run.init_from has not changed since")
        return resolve(BaseRecord, values, where=str(self.source))
