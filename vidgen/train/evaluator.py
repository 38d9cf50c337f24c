"""Protocol of an evaluation during training."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from vidgen.core.typing import Metrics

__all__ = ["Evaluator", "Previews"]


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

    def __call__(self, model: Any, frozen: Mapping[str, Any], *, step: int, workdir: pathlib.Path) -> Metrics:
        """Scalars by name; the main process writes files below `workdir`.

        Args:
          model: `Task.inference_model`.
          frozen: the task's frozen modules by name.
        """
        ...


@runtime_checkable
class Previews(Protocol):
    """Evaluators that the program provides, for a task to choose from; a run has both data and a mesh."""

    def reconstructions(self) -> Sequence[Evaluator]:
        """Reconstructions of held-out clips by a VAE."""
        ...

    def samples(self, task: Any) -> Sequence[Evaluator]:
        """Samples of a `TextToVideoTask`'s model from held-out prompts."""
        ...
