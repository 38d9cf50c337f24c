"""The phases of a task: which take part in a step, and the update rule of their parameters."""

from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from vidgen.core.typing import PyTree
from vidgen.train.optimizer import REST, Optimizer, param_labels
from vidgen.train.task import Phase

__all__ = ["due", "merge_gradients", "named_groups", "transformation"]


def due(phases: Sequence[Phase], step: int) -> tuple[str, ...]:
    """Names of the phases that take part after `step` steps."""
    return tuple(phase.name for phase in phases if step % phase.every == 0)


def named_groups(phases: Sequence[Phase]) -> tuple[str, ...]:
    """Submodules that the phases name."""
    return tuple(group for phase in phases for group in phase.optimizers if group != REST)


def transformation(
    phases: Sequence[Phase], optimizer: Optimizer, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Update rule of all parameters; its extra argument `due` names the phases that take part.

    The others' parameters and moments stay as they are.

    Args:
      optimizer: the run's, for groups without one.
      num_steps: length of the schedules, in steps of the run.
    """
    names = [phase.name for phase in phases]
    groups = [group for phase in phases for group in phase.optimizers]
    if len({*names}) < len(names) or len({*groups}) < len(groups) or phases[0].every != 1:
        raise ValueError(
            f"phases {names} train {groups}: names and submodules must differ, and the first phase take part "
            "in every step"
        )
    rules: dict[Hashable, optax.GradientTransformation] = {
        group: _rule(phase, group, optimizer, num_steps) for phase in phases for group in phase.optimizers
    }
    if groups == [REST]:
        return optax.with_extra_args_support(rules[REST])
    return optax.partition(rules, lambda params: param_labels(params, groups))


def _rule(phase: Phase, group: str, optimizer: Optimizer, num_steps: int) -> optax.GradientTransformation:
    rule = (phase.optimizers[group] or optimizer).transformation(-(-num_steps // phase.every))
    if phase.every == 1:
        return rule
    takes_part = lambda step, *, due, **_: phase.name in due  # noqa: E731
    return optax.transforms.conditionally_mask(rule, takes_part, forward_extra_args=True)


def merge_gradients(grads: Mapping[str, PyTree], phases: Sequence[Phase], params: PyTree) -> PyTree:
    """Gradient of each parameter by the loss of its phase; 0 if the phase does not take part.

    Args:
      grads: gradients with respect to all parameters, by phase.
    """
    if len(phases) == 1:
        return grads[phases[0].name]
    zeros = jax.tree.map(jnp.zeros_like, params)
    sources = {group: grads.get(phase.name, zeros) for phase in phases for group in phase.optimizers}
    groups = list(sources)
    labels = param_labels(params, groups)
    return jax.tree.map(lambda label, *options: options[groups.index(label)], labels, *sources.values())
