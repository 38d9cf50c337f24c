"""The role of an evaluation inside a training run."""

import pathlib
from typing import Protocol, runtime_checkable

from flax import nnx

from vidgen.core.typing import Metrics

__all__ = ["Evaluator"]


@runtime_checkable
class Evaluator(Protocol):
    """Looks at the model every so many steps: scores, sample grids.

    The loop calls it on all processes at once, under the run's mesh, with the averaged weights.
    """

    @property
    def name(self) -> str:
        """Prefix of its metrics."""
        ...

    @property
    def every(self) -> int:
        """Steps between two calls; 0 is only at the end of the run."""
        ...

    def __call__(
        self, model: nnx.Module, frozen: nnx.Module | None, *, step: int, workdir: pathlib.Path
    ) -> Metrics:
        """Scalars by name; files go below `workdir`, written by the main process."""
        ...
