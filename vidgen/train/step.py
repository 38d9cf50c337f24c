"""One step of training as a pure function: (state, frozen, batch) -> (state, metrics)."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Key, Metrics, PyTree
from vidgen.nn.variables import Buffer
from vidgen.parallel.rules import constrain_tree
from vidgen.train.optimizer import param_labels
from vidgen.train.state import TrainState
from vidgen.train.task import Task, Total

__all__ = ["StepOptions", "TrainStep", "clipped", "make_train_step"]

TrainStep = Callable[[TrainState, nnx.State | None, dict[str, Array]], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Gradient accumulation, gradient clipping and weight averaging.

    Attributes:
      grad_accumulation: micro-batches per step, computed one after the other; must divide the batch.
      grad_clip: largest gradient norm, for each of the `param_groups` and for the rest separately; None does
        not clip.
      ema_decay: decay of the averaged weights per step, at most (1 + step) / (10 + step).
    """

    grad_accumulation: int = 1
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999


def make_train_step(
    task: Task,
    graphdef: nnx.GraphDef,
    frozen_graphdef: nnx.GraphDef | None,
    tx: optax.GradientTransformation,
    options: StepOptions,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
    """Compiled training step, which donates its input state.

    If the loss or the gradient norm is not finite, only the step number changes.

    Args:
      graphdef: graph definition of the trained module, from `init_state`.
      frozen_graphdef: graph definition of the task's frozen module, or None.
      schedule: learning rate by step, for the metrics.

    Returns:
      A function of (state, frozen state or None, batch). Its metrics are the task's, `loss`, `grad_norm` and
      `learning_rate`, and `grad_norm/<name>` for each of the task's `param_groups`: float32 scalars on the
      device.
    """

    def loss_fn(
        params: PyTree, buffers: PyTree, frozen: PyTree, batch: dict[str, Array], key: Key[Array, ""], done
    ):
        # Variables can only be written at the trace level that created them: recreate the buffers here.
        buffers, frozen = jax.tree.map(lambda x: x, (buffers, frozen))
        model = nnx.merge(graphdef, params, buffers)
        frozen_model = None if frozen_graphdef is None else nnx.merge(frozen_graphdef, frozen)
        loss, metrics = task.loss(model, frozen_model, batch, key, done)
        return loss.astype(jnp.float32), (metrics, nnx.state(model, Buffer, graph=False))

    def step(state: TrainState, frozen: PyTree, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, metrics, buffers, grads = _gradients(
            loss_fn, state, frozen, batch, key, options.grad_accumulation
        )
        grads = constrain_tree(grads)
        grad_norm = optax.tree.norm(grads)
        grads, norms = clipped(grads, options.grad_clip, task.param_groups)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = _average(state.ema, params, _decay(state.step, options.ema_decay))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        old = (state.params, state.buffers, state.ema, state.opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (params, buffers, ema, opt_state), old)
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            **dict(zip(("params", "buffers", "ema", "opt_state"), new, strict=True)),
        )
        extra = {"loss": loss, "grad_norm": grad_norm} | norms
        if schedule is not None:
            extra["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return constrain_tree(new_state), {**metrics, **extra}

    return jax.jit(step, donate_argnums=0)


def clipped(
    grads: PyTree, largest: float | None, param_groups: Mapping[str, Any]
) -> tuple[PyTree, dict[str, Array]]:
    """Gradients clipped to norm `largest` per group, and the unclipped norms of `param_groups`."""
    labels = param_labels(grads, param_groups)
    labelled = zip(jax.tree.leaves(labels), jax.tree.leaves(grads), strict=True)
    by_name = itertools.groupby(sorted(labelled, key=lambda pair: pair[0]), key=lambda pair: pair[0])
    norms = {name: optax.tree.norm([leaf for _, leaf in pairs]) for name, pairs in by_name}
    if largest is not None:
        scales = {name: largest / jnp.maximum(norm, largest) for name, norm in norms.items()}
        grads = jax.tree.map(lambda name, g: g * scales[name], labels, grads)
    return grads, {f"grad_norm/{name}": norms[name] for name in param_groups}


def _gradients(loss_fn, state: TrainState, frozen: PyTree, batch, key: Key[Array, ""], count: int):
    """Loss, metrics, buffers and gradients over the batch, in `count` micro-batches."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        (loss, (metrics, buffers)), grads = grad_fn(
            state.params, state.buffers, frozen, batch, key, state.step
        )
        return loss, _reduce_metrics(metrics, lambda x: x, lambda x: x), buffers, grads

    def split(x: Array) -> Array:
        if x.shape[0] % count:
            raise UserError(f"grad_accumulation is {count}, which does not divide the batch of {x.shape[0]}")
        # Example i goes to micro-batch i % count: each micro-batch stays sharded over all devices, without
        # communication.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, inputs):
        buffers, total = carry
        micro, index = inputs
        (loss, (metrics, buffers)), grads = grad_fn(
            state.params, buffers, frozen, micro, jax.random.fold_in(key, index), state.step
        )
        return (buffers, jax.tree.map(jnp.add, total, grads)), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    inputs = (jax.tree.map(split, batch), jnp.arange(count))
    (buffers, total), (losses, metrics) = jax.lax.scan(body, (state.buffers, zeros), inputs)
    metrics = _reduce_metrics(metrics, lambda x: x.mean(0), lambda x: x.sum(0))
    return losses.mean(0), metrics, buffers, jax.tree.map(lambda g: g / count, total)


def _reduce_metrics(
    metrics: Metrics, mean: Callable[[Array], Array], total: Callable[[Array], Array]
) -> Metrics:
    """Metrics of a step, from its micro-batches: `Total`s reduced by `total`, others by `mean`."""
    return {
        name: total(value.value) if isinstance(value, Total) else mean(value)
        for name, value in metrics.items()
    }


def _decay(step: Array, decay: float) -> Float[Array, ""]:
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _average(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda e, p: e * decay + p.astype(jnp.float32) * (1 - decay), ema, params)
