"""Protocol of an evaluation during training."""

import pathlib
from typing import Protocol, runtime_checkable

from flax import nnx

from vidgen.core.typing import Metrics

__all__ = ["Evaluator"]


@runtime_checkable
class Evaluator(Protocol):
    """Evaluates the model at intervals: scores, sample grids.

    The loop calls it on all processes at once, under the run's mesh, with the averaged weights.
    """

    @property
    def name(self) -> str:
        """Prefix of its metrics."""
        ...

    @property
    def every(self) -> int:
        """Steps between calls; 0 evaluates at the end of the run only."""
        ...

    def __call__(
        self, model: nnx.Module, frozen: nnx.Module | None, *, step: int, workdir: pathlib.Path
    ) -> Metrics:
        """Scalars by name; the main process writes files below `workdir`."""
        ...
