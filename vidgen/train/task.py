"""The role that a kind of training plays in the loop."""

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
    """A metric of a loss that adds up over the micro-batches of a step, as others are averaged.

    Attributes:
      value: scalar.
    """

    value: Any


@runtime_checkable
class Task(Protocol):
    """What is trained: a module, the arrays that it needs of a batch, and its loss.

    A new kind of training is a new task, never a new loop. Tasks are frozen dataclasses of options; weights
    live in the modules that they build.
    """

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module whose `nnx.Param`s are trained; called under `jax.jit` with sharded outputs."""
        ...

    @property
    def param_groups(self) -> Mapping[str, Optimizer]:
        """Submodules, by the names of their attributes, that learn apart from the rest of the module.

        Each has its own rule, in place of the run's optimizer, and its gradient is clipped by its own norm. A
        run that starts from another's weights has them made anew where the other has none.
        """
        ...

    def inference_model(self, model: nnx.Module) -> nnx.Module:
        """What is evaluated, kept and sampled from: the module without what only training needs."""
        ...

    def frozen(self) -> nnx.Module | None:
        """A module with weights that the loss reads and nothing trains (a VAE, say), or None."""
        ...

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a host batch that go to the device; each has the batch as its first axis."""
        ...

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        """Shapes and dtypes of `arrays` for so many clips of the size of `data`; no file is read.

        Args:
          data: options of data, of one size (`vidgen.data.buckets.with_size`), or of packed latents.
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
          batch: arrays as given by `arrays`, on device.
          key: a key of this step alone.
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
        """Leaves below `workdir` what a complete run makes for others, if anything.

        Called on all processes after the last step, and again whenever the complete run is started: what is
        there of this step stays. A signal may end it anywhere.

        Args:
          model: with averaged weights (`product`).
          step: the last.
          open_clips: opens a loader of the training clips from the beginning.
          mesh: the run's.
        """
        ...
