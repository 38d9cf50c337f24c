"""Protocol of a kind of training, as used by the training loop."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core.typing import Array, Float, Int, Metrics
from vidgen.train.batch_spec import BatchSpec
from vidgen.train.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A metric that is summed over the micro-batches of a step; other metrics are averaged.

    Attributes:
      value: scalar.
    """

    value: Any


@runtime_checkable
class Task(Protocol):
    """A module to train, the arrays that it needs from a batch, and its loss.

    A new kind of training is a new task, never a new loop. Tasks are frozen dataclasses of options; weights
    live in the modules that they build.
    """

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Module whose `nnx.Param`s are trained; called under `jax.jit` with sharded outputs."""
        ...

    @property
    def param_groups(self) -> Mapping[str, Optimizer]:
        """Submodules, by attribute name, with an optimizer that replaces the run's.

        The gradient of each is clipped by its norm alone. When a run starts from another run's weights
        (`run.init_from`), submodules that the other run lacks are newly initialized.
        """
        ...

    def inference_model(self, model: nnx.Module) -> nnx.Module:
        """Module to evaluate, export and sample from: `model` without parts that only training needs."""
        ...

    def frozen(self) -> nnx.Module | None:
        """Module with weights that the loss reads and nothing trains (e.g. a VAE), or None."""
        ...

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays of a host batch that go to the device; the first axis of each is the batch."""
        ...

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        """Shapes and dtypes of `arrays` for `batch_size` clips of the size of `data`; reads no file.

        Args:
          data: data options of one size (`vidgen.data.buckets.with_size`), or of packed latents.
        """
        ...

    def loss(
        self,
        model: nnx.Module,
        frozen: nnx.Module | None,
        batch: Mapping[str, Array],
        key: Array,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over the batch, and scalar metrics or `Total`s. May update `Buffer`s of `model` in place.

        Args:
          batch: the arrays from `arrays`, on device.
          key: random key of this step only.
          step: steps done before this one.
        """
        ...

    def finish(
        self,
        model: nnx.Module,
        *,
        step: int,
        workdir: pathlib.Path,
        open_clips: Callable[[], Any] | None,
        mesh: Mesh,
    ) -> None:
        """Writes what a complete run provides to others below `workdir`, if anything.

        Called on all processes after the last step, and again whenever the complete run is started: files of
        this step stay as they are. A signal may interrupt it anywhere.

        Args:
          model: `inference_model` with averaged weights.
          step: last step.
          open_clips: opens a loader of the training clips, from the first clip.
          mesh: mesh of the run.
        """
        ...
