"""Optimizer options: AdamW, and Muon for matrices; learning rates with warm-up and cosine decay."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import optax
from flax import nnx

from vidgen.core.typing import PyTree

__all__ = ["REST", "AdamW", "Muon", "Optimizer", "RunOptimizer", "cosine_schedule", "param_labels"]

REST = ""
"""Label of the parameters in no named group."""


@runtime_checkable
class Optimizer(Protocol):
    """Options of an update rule for parameters."""

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """The update rule for a run of `num_steps`."""
        ...


@runtime_checkable
class RunOptimizer(Optimizer, Protocol):
    """Options of a run's optimizer."""

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Learning rate by step, for the metrics."""
        ...


def param_labels(params: PyTree, groups: Collection[str]) -> PyTree:
    """Pytree like `params` with each array's submodule if it is in `groups`, `REST` for the others."""

    def name(path: tuple[Any, ...], _: Any) -> str:
        return path[0].key if path[0].key in groups else REST

    return jax.tree_util.tree_map_with_path(name, params)


def cosine_schedule(peak: float, *, warmup_steps: int, num_steps: int, end: float) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then half-cosine decay to `peak * end`.

    The first step already has a rate of peak / warmup_steps, and the last step of the warm-up has the peak;
    `optax.warmup_cosine_decay_schedule` reaches it a step later. A run shorter than its warm-up never decays.
    """
    warmup = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1))
    decay = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1), alpha=end)
    return optax.join_schedules([warmup, decay], [warmup_steps])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay on matrices, not on biases, gains or other vectors (arXiv:1711.05101).

    Attributes:
      warmup_steps: steps of linear warm-up.
      end_fraction: learning rate at the end, as a fraction of `learning_rate`.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 500
    end_fraction: float = 0.1

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Learning rate by step."""
        return cosine_schedule(
            self.learning_rate, warmup_steps=self.warmup_steps, num_steps=num_steps, end=self.end_fraction
        )

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """The update rule for a run of `num_steps`."""
        return optax.adamw(
            self.schedule(num_steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=_decayed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Momentum orthogonalised by Newton-Schulz for matrices and filters, AdamW for embeddings and vectors.

    Stacked layers are orthogonalised one by one; an attention projection with a separate axis of heads is one
    matrix. Updates are scaled to the root mean square of AdamW's (arXiv:2502.16982), so both need similar
    learning rates.

    Attributes:
      beta: momentum.
      adam_learning_rate, adam_b1, adam_b2: options of Adam for parameters that are not matrices; a rate of
        None is `learning_rate`; both rates follow the same schedule.
      consistent_rms: root mean square of an update, in units of the learning rate.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: float = 3e-4
    beta: float = 0.95
    weight_decay: float = 0.01
    consistent_rms: float = 0.2
    adam_learning_rate: float | None = None
    adam_b1: float = 0.9
    adam_b2: float = 0.99
    warmup_steps: int = 500
    end_fraction: float = 0.1

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Learning rate by step."""
        return cosine_schedule(
            self.learning_rate, warmup_steps=self.warmup_steps, num_steps=num_steps, end=self.end_fraction
        )

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """The update rule for a run of `num_steps`."""
        directions = optax.contrib.muon(
            self.learning_rate,
            beta=self.beta,
            consistent_rms=self.consistent_rms,
            adam_learning_rate=self.adam_learning_rate,
            adam_b1=self.adam_b1,
            adam_b2=self.adam_b2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
        # Muon's weight decay has no mask for Adam's parameters. Updates already carry the minus sign.
        decay = optax.add_decayed_weights(-self.weight_decay * self.learning_rate, mask=_decayed)
        shape = cosine_schedule(
            1.0, warmup_steps=self.warmup_steps, num_steps=num_steps, end=self.end_fraction
        )
        return optax.chain(directions, decay, optax.scale_by_schedule(shape))


_NON_MATRIX_AXES = frozenset({"vocab", "patch"})
"""Axes of lookup tables and of the first or last projection; these parameters use Adam."""


def _decayed(params: PyTree) -> PyTree:
    """Mask of the parameters that decay: those with two named axes; not biases, gains and stacks of them."""

    def decays(axes: tuple[str | None, ...], array: Any) -> bool:
        return len([name for name in axes if name not in (None, "layers")]) >= 2 if axes else array.ndim >= 2

    return _by_variable(params, decays)


def _muon_dimensions(params: PyTree) -> PyTree:
    """Muon's dimension numbers for each matrix parameter, None for the others."""
    return _by_variable(params, _array_dimensions)


def _array_dimensions(axes: tuple[str | None, ...], array: Any) -> optax.contrib.MuonDimensionNumbers | None:
    first = axes[:1].count("layers")
    names, dims = axes[first:], range(first, array.ndim)
    if names[-2:] == ("conv_in", "conv_out"):
        return optax.contrib.MuonDimensionNumbers(tuple(dims[:-1]), (dims[-1],))
    if None in names or _NON_MATRIX_AXES.intersection(names):
        return None
    # An attention projection with an axis of heads is a matrix with (heads, head_dim) as one side.
    if len(names) == 3 and names[1:] == ("heads", "head_dim"):
        return optax.contrib.MuonDimensionNumbers((dims[0],), (dims[1], dims[2]))
    if len(names) == 3 and names[:2] == ("heads", "head_dim"):
        return optax.contrib.MuonDimensionNumbers((dims[0], dims[1]), (dims[2],))
    return optax.contrib.MuonDimensionNumbers((dims[0],), (dims[1],)) if len(names) == 2 else None


def _by_variable(params: PyTree, of_array) -> PyTree:
    """Pytree like `params` of `of_array(axes, array)`; `axes` is () for arrays without axis names."""

    def of_node(node):
        axes = tuple(node.get_metadata().get("axes") or ()) if isinstance(node, nnx.Variable) else ()
        return jax.tree.map(lambda array: of_array(axes, array), node)

    return jax.tree.map(of_node, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
