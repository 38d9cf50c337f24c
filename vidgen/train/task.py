"""Protocols of a kind of training: as the training loop uses it, and as the commands do."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core.typing import Array, Float, Int, Metrics, PyTree
from vidgen.models.video_vae.config import VAEConfig
from vidgen.nn.lora import LoRAOptions
from vidgen.train.batch_spec import BatchSpec
from vidgen.train.evaluator import Evaluator, Previews
from vidgen.train.optimizer import Optimizer
from vidgen.train.options import RunOptions
from vidgen.train.text_features import TextFeatures

__all__ = ["Context", "ExperimentTask", "Frozen", "Loss", "Phase", "Task", "Total"]

M = TypeVar("M", bound=nnx.Module)
B = TypeVar("B")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A metric that is summed over the micro-batches of a step; other metrics are averaged.

    Attributes:
      value: scalar.
    """

    value: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """A module that losses read and nothing trains: loaded when a run starts, in no checkpoint.

    Attributes:
      source: path of its weights, for messages.
      load: reads it.
      build: makes a module of the same shapes, called under `nnx.eval_shape`; reads no weights.
    """

    source: str
    load: Callable[[], nnx.Module]
    build: Callable[[], nnx.Module]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context(Generic[M, B]):
    """What a loss reads.

    Attributes:
      model: the trained module. The loss may update its `Buffer`s in place.
      ema: the module with averaged weights, without gradients.
      frozen: frozen modules by name, from `Task.frozen`.
      batch: the arrays from `Task.arrays`, on device.
      key: random key of this step and phase only.
      step: steps done before this one.
    """

    model: M
    ema: M | None = None
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: B
    key: Array
    step: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))


Loss = Callable[[Any], tuple[Float[Array, ""], Metrics]]
"""Mean loss over the batch of a `Context`, and scalar metrics or `Total`s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A loss, the parameters that it trains, with which optimizer and how often.

    The gradients of all phases of a step are taken at the same parameters; then each parameter is updated
    once. Every parameter belongs to one phase.

    Attributes:
      loss: function of a `Context`.
      name: prefix of the phase's metrics, except for a task's only phase.
      optimizers: submodules of the trained module that the phase trains, by attribute name, each with its
        optimizer, or None for the run's. The name "" stands for all submodules that no phase names. The
        gradient of each entry is clipped by its norm alone. When a run starts from another run's weights
        (`run.init_from`), named submodules that the other run lacks are newly initialized.
      every: the phase takes part in the first step and in every `every`-th step after it.
    """

    loss: Loss
    name: str = ""
    optimizers: Mapping[str, Optimizer | None] = dataclasses.field(default_factory=lambda: {"": None})
    every: int = 1


@runtime_checkable
class Task(Protocol):
    """A module to train, the arrays that it needs from a batch, and its losses: all that the loop knows.

    A new kind of training is a new task, never a new loop. Tasks are frozen dataclasses of options; weights
    live in the modules that they build.
    """

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Module whose `nnx.Param`s are trained; called under `jax.jit` with sharded outputs.

        Its `Constant`s are read from `run.init_from` whenever the run starts.
        """
        ...

    def frozen(self) -> Mapping[str, Frozen]:
        """Modules that losses read, by name."""
        ...

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases of a step; the first takes part in every step."""
        ...

    def inference_model(self, model: Any) -> nnx.Module:
        """Module to evaluate, export and sample from: `model` without parts that only training needs."""
        ...

    def arrays(self, batch: Mapping[str, Any]) -> PyTree[np.ndarray]:
        """Arrays of a host batch that go to the device, by field; the first axis of each is the batch."""
        ...

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        """Shapes and dtypes of `arrays` for `batch_size` clips of the size of `data`; reads no file.

        Args:
          data: data options of one size (`vidgen.data.buckets.with_size`), or of packed latents.
        """
        ...

    def finish(
        self,
        model: Any,
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


@runtime_checkable
class ExperimentTask(Task, Protocol):
    """A task that an experiment names: all that the commands ask of it. `VideoTask` is a base for it.

    Attributes:
      scores: what `vidgen evaluate` measures.
    """

    scores: ClassVar[Literal["reconstructions", "prompts", "none"]]

    @property
    def kind(self) -> str:
        """Its name in a config."""
        ...

    @property
    def text_encoder(self) -> TextFeatures | None:
        """Frozen encoder of the captions, which computes features for `arrays`."""
        ...

    @property
    def lora(self) -> LoRAOptions | None:
        """LoRA that is trained in place of the weights."""
        ...

    @property
    def network(self) -> tuple[str, Any]:
        """Field and config of the trained network; the config has `remat` and `dtype`."""
        ...

    def vae_config(self) -> VAEConfig:
        """Config of the VAE that is trained or frozen.

        Raises:
          FileNotFoundError: the frozen VAE is missing.
        """
        ...

    def in_workdir(self, workdir: pathlib.Path) -> "ExperimentTask":
        """The task with the files that a run in `workdir` copied there when it began."""
        ...

    def prepare(self, workdir: pathlib.Path) -> "ExperimentTask":
        """Copies files that the run depends on to `workdir`, once; returns `in_workdir`.

        The run is then self-contained: it can be moved, resumed and sampled from, whatever happens to the
        original files. All processes must call this.
        """
        ...

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "ExperimentTask":
        """The task with another dtype of the matrix products in sampling."""
        ...

    def check(self, data: Any, run: RunOptions, mesh: Mesh) -> None:
        """Checks that model and mesh support every batch of `data`, before one is read.

        Raises:
          ConfigError: names the option, and values that are supported.
        """
        ...

    def loader(self, data: Any) -> Callable[..., Any]:
        """Opens the training clips of `data`; returns a function of the options that loaders share."""
        ...

    def evaluators(self, previews: Previews) -> Sequence[Evaluator]:
        """Evaluators of a run."""
        ...
