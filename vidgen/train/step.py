"""One step of training as a pure function: (state, frozen, batch) -> (state, metrics)."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vidgen.core import rng
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Key, Metrics, PyTree
from vidgen.nn.variables import Buffer
from vidgen.parallel.rules import constrain_tree
from vidgen.train.optimizer import param_labels
from vidgen.train.phases import merge_gradients, named_groups
from vidgen.train.state import FrozenState, TrainState, ema_model, merge_model
from vidgen.train.task import Context, Phase, Task, Total

__all__ = ["StepOptions", "TrainStep", "clipped", "make_train_step"]

TrainStep = Callable[..., tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Gradient accumulation, gradient clipping and weight averaging.

    Attributes:
      grad_accumulation: micro-batches per step, computed one after the other; must divide the batch.
      grad_clip: largest gradient norm, for each of the submodules with an optimizer of their own and for the
        rest separately; None does not clip.
      ema_decay: decay of the averaged weights per step, at most (1 + step) / (10 + step).
    """

    grad_accumulation: int = 1
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999


def make_train_step(
    task: Task,
    graphdef: nnx.GraphDef,
    frozen_graphdefs: Mapping[str, nnx.GraphDef],
    tx: optax.GradientTransformation,
    options: StepOptions,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
    """Compiled training step, which donates its input state.

    If a loss or the gradient norm is not finite, only the step number changes.

    Args:
      graphdef: graph definition of the trained module, from `init_state`.
      frozen_graphdefs: graph definitions of the task's frozen modules.
      tx: from `vidgen.train.phases.transformation`.
      schedule: learning rate by step, for the metrics.

    Returns:
      A function of (state, `FrozenState`, batch, due=names of the phases that take part, all by default),
      compiled once for each set of phases. Its metrics are the phases', `loss` of the first phase,
      `grad_norm` and `learning_rate`, and `grad_norm/<name>` for each named submodule that is trained:
      float32 scalars on the device.
    """
    phases = task.phases
    update = optax.with_extra_args_support(tx).update

    def step(
        state: TrainState, frozen: FrozenState, batch: PyTree, due: tuple[str, ...] | None = None
    ) -> tuple[TrainState, Metrics]:
        active = [phase for phase in phases if due is None or phase.name in due]
        step_key = jax.random.fold_in(state.key, state.step)
        seen, losses, metrics, grads = state, [], {}, {}
        for phase in active:
            key = rng.stream(step_key, phase.name) if phase.name else step_key
            loss_fn = _loss_fn(task, phase, graphdef, frozen_graphdefs, seen, frozen)
            loss, found, buffers, grads[phase.name] = _gradients(
                loss_fn, seen, batch, key, options.grad_accumulation
            )
            seen = dataclasses.replace(seen, buffers=buffers)
            losses.append(loss)
            metrics |= _named(phase.name, found | {"loss": loss})
        merged = constrain_tree(merge_gradients(grads, phases, state.params))
        grad_norm = optax.tree.norm(merged)
        merged, norms = clipped(merged, options.grad_clip, named_groups(phases))
        names = [phase.name for phase in active]
        updates, opt_state = update(merged, state.opt_state, state.params, due=names)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - _decay(state.step, options.ema_decay))
        finite = jnp.isfinite(jnp.stack([*losses, grad_norm])).all()
        old = (state.params, state.buffers, state.ema, state.opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (params, seen.buffers, ema, opt_state), old)
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            **dict(zip(("params", "buffers", "ema", "opt_state"), new, strict=True)),
        )
        trained = named_groups(active)
        metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items() if name in trained}
        metrics |= {"loss": losses[0], "grad_norm": grad_norm}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return constrain_tree(new_state), metrics

    return jax.jit(step, donate_argnums=0, static_argnames="due")


def clipped(grads: PyTree, largest: float | None, groups: Collection[str]) -> tuple[PyTree, dict[str, Array]]:
    """Gradients clipped to norm `largest` per group, and the unclipped norms of `groups`."""
    labels = param_labels(grads, groups)
    labelled = zip(jax.tree.leaves(labels), jax.tree.leaves(grads), strict=True)
    by_name = itertools.groupby(sorted(labelled, key=lambda pair: pair[0]), key=lambda pair: pair[0])
    norms = {name: optax.tree.norm([leaf for _, leaf in pairs]) for name, pairs in by_name}
    if largest is not None:
        scales = {name: largest / jnp.maximum(norm, largest) for name, norm in norms.items()}
        grads = jax.tree.map(lambda name, g: g * scales[name], labels, grads)
    return grads, {name: norms[name] for name in groups}


def _loss_fn(
    task: Task,
    phase: Phase,
    graphdef: nnx.GraphDef,
    frozen_graphdefs: Mapping[str, nnx.GraphDef],
    state: TrainState,
    frozen: FrozenState,
) -> Callable[..., tuple[Array, tuple[Metrics, PyTree]]]:
    """Loss of a phase as a function of all parameters, with gradients for its own only."""
    labels = param_labels(state.params, named_groups(task.phases))

    def loss_fn(params: PyTree, buffers: PyTree, batch: PyTree, key: Key[Array, ""]):
        hold = lambda label, x: x if label in phase.optimizers else jax.lax.stop_gradient(x)  # noqa: E731
        model = merge_model(graphdef, jax.tree.map(hold, labels, params), buffers, frozen.base)
        context = Context(
            model=model,
            ema=ema_model(state, graphdef, frozen.base),
            frozen=frozen.merge(frozen_graphdefs),
            batch=batch,
            key=key,
            step=state.step,
        )
        loss, metrics = phase.loss(context)
        return loss.astype(jnp.float32), (metrics, nnx.state(model, Buffer, graph=False))

    return loss_fn


def _gradients(loss_fn, state: TrainState, batch: PyTree, key: Key[Array, ""], count: int):
    """Loss, metrics, buffers and gradients over the batch, in `count` micro-batches."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        (loss, (metrics, buffers)), grads = grad_fn(state.params, state.buffers, batch, key)
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
        micro_key = jax.random.fold_in(key, index)
        (loss, (metrics, buffers)), grads = grad_fn(state.params, buffers, micro, micro_key)
        return (buffers, jax.tree.map(jnp.add, total, grads)), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    inputs = (jax.tree.map(split, batch), jnp.arange(count))
    (buffers, total), (losses, metrics) = jax.lax.scan(body, (state.buffers, zeros), inputs)
    metrics = _reduce_metrics(metrics, lambda x: x.mean(0), lambda x: x.sum(0))
    return losses.mean(0), metrics, buffers, jax.tree.map(lambda g: g / count, total)


def _named(phase: str, metrics: Metrics) -> Metrics:
    return {f"{phase}/{name}": value for name, value in metrics.items()} if phase else metrics


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
