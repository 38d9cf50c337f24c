"""The role that a kind of training plays in the loop."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from vidgen.core.typing import Array, Float, Int, Metrics
from vidgen.train.optimizer import Optimizer


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
    def apart(self) -> Mapping[str, Optimizer]:
        """Submodules, by the names of their attributes, that learn apart from the rest of the module.

        Each has its own rule, in place of the run's optimizer, and its gradient is clipped by its own norm. A
        run that starts from another's weights has them made anew where the other has none.
        """
        ...

    def product(self, model: nnx.Module) -> nnx.Module:
        """What is evaluated, kept and sampled from: the module without what only training needs."""
        ...

    def frozen(self) -> nnx.Module | None:
        """A module with weights that the loss reads and nothing trains (a VAE, say), or None."""
        ...

    def arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a host batch that go to the device; each has the batch as its first axis."""
        ...

    def loss(
        self,
        model: nnx.Module,
        frozen: nnx.Module | None,
        batch: Mapping[str, Array],
        key: Array,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over the batch, and scalar metrics. May update the `Buffer`s of `model` in place.

        Args:
          batch: arrays as given by `arrays`, on device.
          key: a key of this step alone.
          step: steps done before this one.
        """
        ...
